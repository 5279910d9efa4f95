"""The verdict's conditions: frozen, apart from training and from each other, and what the simulator
does with them. Nothing of a test is rendered here.
"""

import hashlib
import json

import numpy as np
import pytest
from helpers import shifts

import eval as evaluation
from camera import project
from runtime import UserError
from sim import layouts, recipe, settings, verdict
from sim.events import ASIDE, BESIDE, MovedMidway
from sim.expert import GRASP
from sim.rollout import BlindAgent, run_episode

K, DEFAULT = settings.default_camera()
PAIR = (recipe.BOWL, recipe.PLATE)
SETS = {
    "verdict_viewpoint": "5b10b5f3b0a4",
    "verdict_viewpoint_low": "6d03e1d75e47",
    "verdict_position": "452a08afea58",
    "val_verdict_viewpoint": "2e39adb1b9b5",
    "val_verdict_position": "72c205874787",
    "val_verdict_swap": "7a8f0b111e07",
}
# metres by which bowl and plate are moved in `verdict_shifted` episode 7
SHIFTED_7 = [[0.01576, -0.04208], [0.04584, 0.01061]]


def digest(conditions):
    """A hash of angles to 0.001 degrees and places to 0.1 mm."""
    rows = [
        [
            round(c.theta, 3),
            round(c.phi, 3),
            [[n, round(x, 4), round(y, 4)] for n, x, y in c.places],
        ]
        for c in conditions
    ]
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=6).hexdigest()


@pytest.mark.parametrize("layout", SETS)
def test_conditions_are_frozen(layout):
    """Figures are about these conditions: where one changes, the old figures are of another set."""
    assert digest(layouts.conditions(layout)) == SETS[layout]


def pairs(conditions):
    """Bowl and plate of conditions, (N,2,2) m."""
    return np.array([[c.place_of[n] for n in PAIR] for c in conditions])


def nearest(some, others):
    """The smallest distance in cm between two sets of layouts (N,2,2): the larger one of that
    between the bowls and that between the plates.
    """
    apart = np.linalg.norm(some[:, None] - others[None], axis=-1)
    return 100 * apart.max(-1).min()


def test_positions_are_apart():
    """Training, validation and test share no joint place of bowl and plate, by these distances in
    cm. On the test side not even one of the two stands where a demonstration has it.
    """
    demos = pairs(
        recipe.drawn("train", 0, i, 0, recipe.is_clean("train", 0, i)) for i in range(400)
    )
    test, val, swap = (
        pairs(found)
        for found in (verdict.positions("test"), verdict.positions("val"), verdict.val_swaps())
    )
    for some, others, least in (
        (demos, test, 7),
        (val, test, 2),
        (demos, pairs([usual(recipe.SWAPPED)]), 5),
        (demos, pairs([usual(recipe.USUAL)]), 8),
        (demos, swap, 2.8),
        (swap, pairs([usual(recipe.SWAPPED)]), 12),
    ):
        assert nearest(some, others) >= least
    assert test[..., 1].max() < -0.07 < -0.05 <= val[..., 1].min()
    assert val[..., 1].max() <= 0 <= demos[..., 1].min()
    # bowl and plate of the test move by themselves
    assert np.abs(np.corrcoef(test[:, 0].T, test[:, 1].T)[:2, 2:]).max() < 0.6


def usual(places):
    return settings.Condition(places=tuple((n, *p) for n, p in places.items()))


def direction(condition):
    return -settings.orbit(DEFAULT, condition.theta, condition.phi)[:3, 2]


def between(some, others):
    """The smallest angle in degrees between two sets of views."""
    cosines = np.array([direction(c) for c in some]) @ np.array([direction(c) for c in others]).T
    return np.degrees(np.arccos(np.clip(cosines, -1, 1))).min()


def test_views_are_apart():
    """Degrees between test, validation, training and the older sets of views."""
    tests = verdict.views() + verdict.low_views()
    assert min(c.theta for c in tests) - recipe.THETA["train"][1] >= 6
    assert min(c.theta for c in verdict.val_views()) - recipe.THETA["train"][1] >= 1.5
    assert between(tests, verdict.val_views()) > 3.9
    older = [
        c
        for split in settings.SPLITS["viewpoint"]
        for part in ("val", "test")
        for c in settings.conditions("viewpoint", part, split)
    ]
    assert between(tests, older) > 2.9
    # Turned about the robot a training camera comes nearer. Still the workspace is seen 9 pixels
    # elsewhere on average, of 448; two neighbours of 6000 training cameras differ by 2.
    rng = np.random.default_rng(0)
    train = np.array([seen(c) for c in recipe.views(rng, "train", 40, 2000, 1.0)])
    for c in tests:
        shown = seen(c)
        assert np.linalg.norm(train - shown, axis=-1).mean(1).min() > 9


def seen(view):
    """Pixels (N,2) at which a settings.Condition shows points of the workspace."""
    orbited = settings.orbit(DEFAULT, view.theta, view.phi)
    loose = settings.loosened(orbited, view.roll, view.pan, view.tilt, view.distance)
    E = settings.turned(loose, view.turn, recipe.BASE)
    axes = (-0.3, -0.1, 0.1), (-0.2, 0.0, 0.2), (0.9, 1.05)
    points = np.stack(np.meshgrid(*axes), -1).reshape(-1, 3)
    return np.stack(project(points, K, E)[:2], -1)


def test_low_views_are_those_that_decode_badly():
    assert len(verdict.views()) >= verdict.N and len(verdict.low_views()) >= 30
    assert (
        max(settings.decode_error(settings.orbit(DEFAULT, c.theta, c.phi)) for c in verdict.views())
        <= 0.03
    )
    for c in verdict.low_views():
        assert settings.decode_error(settings.orbit(DEFAULT, c.theta, c.phi)) > 0.03


@pytest.mark.parametrize(
    "layout, clean", [("verdict_position", True), ("val_verdict_swap", False), ("position", False)]
)
def test_all_rows_have_the_scene_of_the_layout(layout, clean):
    """A checkpoint of full-scene demonstrations is tested in the clean scene where the layout is:
    else its episodes would be others than those that it is compared on, and `verdict_position` has
    the stove where the bowl goes. The older layouts keep the scene of the demonstrations.
    """
    args = evaluation.build_parser().parse_args(["--layout", layout])
    info = {"model_type": "para", "backbone_identity": "", "dataset": {"clean_scene": "False"}}
    evaluation.as_trained(args, info, {"image_size": 112, "waypoint_stride": 5})
    if args.clean_scene is None:
        args.clean_scene = settings.clean_by_default(layouts.LAYOUTS[layout].setting)
    assert args.clean_scene == clean


# -- in the simulator


def test_shifted_layouts_are_frozen(scene):
    np.testing.assert_allclose(shifts(scene, "verdict_shifted", 7), SHIFTED_7, atol=2e-3)


def test_positions_stand_where_they_are_drawn(scene):
    """Bowl and plate stand at the episode's own places, whatever episode came before."""
    wanted = verdict.positions("test")[3]
    state, condition = layouts.episode_state(scene, "verdict_position", 3)
    assert condition == wanted
    for name, place in wanted.place_of.items():
        np.testing.assert_allclose(state[scene._address(name)][:2], place, atol=0.011)
    layouts.episode_state(scene, "val_verdict_position", 1)
    again, _ = layouts.episode_state(scene, "verdict_position", 3)
    np.testing.assert_array_equal(state, again)


class Spied(MovedMidway):
    """Also keeps all joints before and after each control step's note."""

    def note(self, scene, step):
        before = scene.joints()
        super().note(scene, step)
        changed = np.flatnonzero(scene.joints() != before)
        self.changed = [*getattr(self, "changed", []), changed]


def test_the_bowl_is_set_aside_once_and_nothing_else(scene, tmp_path, monkeypatch):
    """As the arm hovers, the bowl goes 5 cm aside, off the planned grasp. The expert, who looks,
    brings it to the plate all the same. A plan that is played to its end closes beside it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layouts, "MovedMidway", Spied)
    events, event = [], layouts.event
    monkeypatch.setattr(layouts, "event", lambda *a: events.append(event(*a)) or events[-1])
    worker = evaluation.EvalWorker.__new__(evaluation.EvalWorker)
    words = "--policy expert --layout val_moved_midway --grasp side --variant task --n_videos 0"
    worker.args, worker.scene = evaluation.build_parser().parse_args(words.split()), scene
    worker.said = {}
    row = worker.episode(1)
    moved = row["moved"]
    assert row["released"] and row["layout"] == "val_moved_midway"
    way = np.subtract(moved["to"], moved["from"])
    assert np.linalg.norm(way) == pytest.approx(ASIDE, abs=1e-3)
    assert np.linalg.norm(np.add(moved["from"], GRASP[:2]) - moved["to"]) > BESIDE - 1e-3
    changes = [(i + 1, c) for i, c in enumerate(events[0].changed) if len(c)]
    assert [step for step, _ in changes] == [moved["step"]]
    bowl = scene._address(scene.pick).start - 1
    assert changes[0][1].tolist() == [bowl, bowl + 1]
    # the same episode, by a plan that looks at nothing
    state, _ = layouts.episode_state(scene, "val_moved_midway", 1)
    blind, _, _ = run_episode(
        scene, BlindAgent(), state, max_steps=120, event=event("val_moved_midway", 1)
    )
    assert not blind["success"]
    np.testing.assert_allclose(blind["moved"]["to"], moved["to"], atol=0.002)


def test_a_place_that_is_taken_is_refused(scene):
    """The bowl is not set onto the plate: it stays where it was."""
    scene.begin_episode(scene.init_states()[0])
    before = scene.joints()
    assert not scene.set_aside(scene.pick, scene.position(scene.place)[:2])
    np.testing.assert_array_equal(scene.joints(), before)


def test_a_layout_with_objects_that_the_scene_lacks_is_one_sentence(scene):
    """The clean scene holds bowl and plate: no box can be exchanged for the plate there."""
    with pytest.raises(UserError, match="cookies_1.*leave out --clean_scene"):
        layouts.episode_state(scene, "val_verdict_swap", 0)
