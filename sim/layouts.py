"""Where an episode takes place: init state, view and position by layout and index.

`benchmark` is LIBERO's own init states. `shifted` moves the task's objects 4-5 cm, each by itself.
`viewpoint` and `viewpoint_shifted` are these two, each episode seen from the next of the test views
of sim/settings.py. `position` takes the test positions in turn, with the same few random layouts at
each. `val`, `val_shifted` and so on are random layouts, views and positions apart from all of
these, for tuning.
"""

from sim import settings

# first seeds of the shifts of `shifted` and `val_shifted`. They do not come from
# settings.random_seed, so that the shifted test layouts stay as published.
SHIFT_SEED, VAL_SHIFT_SEED = 3_000, 90_000_000
ATTEMPTS = 60  # at a random layout
LAYOUTS = {  # -> (setting, which of its conditions)
    "benchmark": ("in_dist", "test"),
    "shifted": ("in_dist", "test"),
    "val": ("in_dist", "val"),
    "val_shifted": ("in_dist", "val"),
    "viewpoint": ("viewpoint", "test"),
    "viewpoint_shifted": ("viewpoint", "test"),
    "val_viewpoint": ("viewpoint", "val"),
    "val_viewpoint_shifted": ("viewpoint", "val"),
    "position": ("position", "test"),
    "val_position": ("position", "val"),
}


def episode_state(scene, layout, index, split=None):
    """Put the camera where an episode has it -> (its init state (S,), its settings.Condition).

    Both depend on layout, split and index alone, whatever was tested before and on which worker.
    """
    setting, part = LAYOUTS[layout]
    conditions = settings.conditions(setting, part, split)
    condition = conditions[index % len(conditions)]
    if part == "test" and setting != "position":
        # the benchmark's init states in turn
        states = scene.init_states()
        state = states[index % len(states)]
    else:
        # a random layout, drawn for this episode
        draw = ("val_layout", index)
        if setting == "position":  # the same layouts at every position
            draw = f"{part}_position", index // len(conditions)
        state = first_valid(scene, *draw, scene.common_shift(condition))
    if layout.endswith("shifted"):
        seed = SHIFT_SEED if part == "test" else VAL_SHIFT_SEED
        state = scene.shifted_layout(state, seed + index)
    scene.set_view(condition)  # last: a random layout rebuilds the model
    return state, condition


def first_valid(scene, purpose, index, offsets):
    """The first good random layout (S,) for an index of a purpose of sim/settings.py. It is the
    same for every --seed. offsets: see `Placement.random_layout`.

    Raises RuntimeError after ATTEMPTS bad ones.
    """
    for attempt in range(ATTEMPTS):
        state = scene.random_layout(
            settings.random_seed(purpose, 0, index, attempt), offsets=offsets
        )
        if state is not None:
            return state
    crowded = ""
    if offsets:
        by = next(iter(offsets.values()))
        crowded = f", objects shifted by {by}: in a full scene they meet others, see --clean_scene"
    raise RuntimeError(f"{ATTEMPTS} resets in a row were bad for {purpose} {index}{crowded}")
