"""What the matrix compares: rows are policies, columns are settings and what is tested in each."""

from typing import NamedTuple

# of training, the same for every row whatever its machine
STEPS = {"small": 2500, "full": 10_000}
# flags of an evaluation or a collection that leave an episode's result as it is
INCIDENTAL = {"--workers", "--timeout", "--n_episodes", "--n_videos", "--trace"}
# flags that say where a command runs and where its files lie
PLACES = {"--out", "--device", "--wandb", "--backbone_weights"}


class Row(NamedTuple):
    """A policy: its --model_type and further flags of its training; or an untrained one, its
    --policy.

    demos: where it is trained on demonstrations of its own, which of OWN_DEMOS. setting: where it
    is trained on one setting whatever is tested, which --setting of collect_demos.py.
    """

    model_type: str = None
    flags: tuple = ()
    policy: str = None
    demos: str = ""
    setting: str = ""


def _without(flags, *words):
    """Flags () of a row without some words."""
    return tuple(flag for flag in flags if flag not in words)


class Column(NamedTuple):
    """What is trained on, a --setting of collect_demos.py; what is tested, layouts of eval.py with
    their numbers of episodes.

    split: of the setting's conditions, where it is not the default. suite: a LIBERO-PRO suite that
    is tested in place of the one that is trained on, on its own init states.
    """

    setting: str
    layouts: dict
    split: str = None
    suite: str = None

    @property
    def data(self):
        """Name of the demonstrations: columns with the same share them, and what is trained on
        them.
        """
        return f"{self.setting}_{self.split}" if self.split else self.setting

    def demos(self, own="", setting=""):
        """Name of the demonstrations of a row with demonstrations of its own, one of OWN_DEMOS, or
        with a setting of its own, or of all others.
        """
        data = setting or self.data
        return f"{data}_{own}" if own else data

    def cell(self, layout):
        """A tested layout's name in the table."""
        return "_".join(
            [layout, *filter(None, [self.split, self.suite and self.suite.rpartition("_")[2]])]
        )


ROWS = {
    # without training: lower and upper bounds of what a table can show
    "blind": Row(policy="blind"),
    "oracle": Row(policy="oracle"),
    "expert": Row(policy="expert"),
    "para": Row("para"),
    "act": Row("act"),
    "a_mlp": Row("autoregressive", ("--head", "mlp")),
    "a_pointer": Row("autoregressive", ("--head", "pointer")),
    "b": Row("voxel_ar"),
    "c": Row("voxel_ar_rel"),
    "d": Row("dino_volume_kv"),
}
ATTEMPTS = {  # to lift `viewpoint`, then `position`; they run only where asked for
    "para_rays": Row("para", ("--rays",)),
    "a_rays": Row("autoregressive", ("--head", "pointer", "--rays")),
    "para_mirror": Row("para", ("--mirror",)),
    "a_pointer_mirror": Row("autoregressive", ("--head", "pointer", "--mirror")),
    "b_mirror": Row("voxel_ar", ("--mirror",)),
    "c_mirror": Row("voxel_ar_rel", ("--mirror",)),
    "para_shift_aug": Row(
        "para", ("--shift_aug", "128", "--dilations", "1,2,4,8,16"), demos="starts"
    ),
    "para_turned": Row("para", ("--shift_aug", "128", "--dilations", "1,2,4,8,16"), demos="turns"),
    "a_turned": Row(
        "autoregressive", ("--shift_aug", "128", "--dilations", "1,2,4,8,16"), demos="turns"
    ),
    "b_turned": Row(
        "voxel_ar",
        ("--shift_aug", "128", "--dilations", "1,2,4,8,16", "--turn_back"),
        demos="turns",
    ),
    "c_turned": Row(
        "voxel_ar_rel",
        ("--shift_aug", "128", "--dilations", "1,2,4,8,16", "--turn_back"),
        demos="turns",
    ),
}
ROWS.update(ATTEMPTS)
# flags of the recipe's trainings: images moved sideways, fingers that met told apart from those
# that hold something, a trunk that sees 30 cm
MOVED = ("--shift_aug", "128", "--fingers", "3")
RECIPE_FLAGS = (*MOVED, "--dilations", "1,2,4,8,16")
RECIPE = {  # one training of each policy on the recipe's demonstrations, for all columns
    # what answers in cells is told where their rays go, as cameras differ
    "para_recipe": Row("para", (*RECIPE_FLAGS, "--rays"), setting="recipe"),
    "a_recipe": Row(
        "autoregressive", ("--head", "pointer", *RECIPE_FLAGS, "--rays"), setting="recipe"
    ),
    "a_mlp_recipe": Row("autoregressive", ("--head", "mlp", *MOVED), setting="recipe"),
    # what answers in world coordinates sees the world turned instead of the camera
    "act_recipe": Row("act", (*MOVED, "--turn_back"), setting="recipe"),
    "b_recipe": Row("voxel_ar", (*RECIPE_FLAGS, "--turn_back"), setting="recipe"),
    "c_recipe": Row("voxel_ar_rel", (*RECIPE_FLAGS, "--turn_back"), setting="recipe"),
    "d_recipe": Row("dino_volume_kv", (*RECIPE_FLAGS, "--rays"), setting="recipe"),
}
ROWS.update(RECIPE)
# the recipe without one of its parts, for column `val_verdict`; they run only where asked for
WITHOUT = {
    # in its demonstrations, see OWN_DEMOS
    **{
        f"{name}_without_{part}": RECIPE[name]._replace(demos=f"without_{part}")
        for name in ("para_recipe", "c_recipe")
        for part in ("mistakes", "hand", "turns", "starts")
    },
    # in its training
    **{
        f"{name}_without_{part}": RECIPE[name]._replace(flags=_without(RECIPE[name].flags, *words))
        for name, part, *words in (
            ("para_recipe", "shifts", "--shift_aug", "128"),
            ("para_recipe", "fingers", "--fingers", "3"),
            ("para_recipe", "dilations", "--dilations", "1,2,4,8,16"),
            ("para_recipe", "rays", "--rays"),
            ("c_recipe", "shifts", "--shift_aug", "128"),
            ("c_recipe", "fingers", "--fingers", "3"),
            ("c_recipe", "dilations", "--dilations", "1,2,4,8,16"),
            ("c_recipe", "turn_back", "--turn_back"),
        )
    },
}
ROWS.update(WITHOUT)
# plain rows, and the same policy trained with the recipe; before it, with what `position` taught
RECIPES = {
    "para": ("para_recipe", "para_turned"),
    "act": ("act_recipe",),
    "a_mlp": ("a_mlp_recipe",),
    "a_pointer": ("a_recipe", "a_turned"),
    "b": ("b_recipe", "b_turned"),
    "c": ("c_recipe", "c_turned"),
    "d": ("d_recipe",),
}
COLUMNS = {
    "in_dist": Column("in_dist", {"benchmark": 50, "shifted": 50}),
    "viewpoint": Column("viewpoint", {"viewpoint": 64}),
    "viewpoint_shifted": Column("viewpoint", {"viewpoint_shifted": 64}),
    "position": Column("position", {"position": 100}),
    "viewpoint_hemisphere": Column("viewpoint", {"viewpoint": 64}, split="hemisphere"),
    "position_near_far": Column("position", {"position": 100}, split="near_far"),
    # the verdict: fresh test sets, see sim/verdict.py, of one training
    "verdict": Column(
        "in_dist",
        {
            "benchmark": 50,
            "verdict_shifted": 50,
            "verdict_viewpoint": 50,
            "verdict_viewpoint_shifted": 50,
            "verdict_viewpoint_low": 35,
            "verdict_position": 50,
            "moved_midway": 50,
        },
    ),
    # what is tuned on in their place
    "val_verdict": Column(
        "in_dist",
        {
            "val_shifted": 24,
            "val_verdict_viewpoint_shifted": 24,
            "val_verdict_position": 24,
            "val_verdict_swap": 24,
            "val_moved_midway": 24,
        },
    ),
    # plate and cookie box have changed places
    "pro_swap": Column("in_dist", {"benchmark": 50}, suite="libero_spatial_swap"),
    # bowls and plate look different
    "pro_object": Column("in_dist", {"benchmark": 50}, suite="libero_spatial_object"),
}
# the row that others are compared with, episode by episode; of the recipe's rows it is PARA's, and
# of rows without one of its parts the whole recipe
REFERENCE = "para"
REFERENCES = {
    **{row: "para_recipe" for row in RECIPE if row != "para_recipe"},
    **{row: row.partition("_without_")[0] for row in WITHOUT},
}
OWN_DEMOS = {  # flags of their collection; the name of the dataset ends in theirs
    "starts": ("--start_spread", "0.3"),  # the arm starts elsewhere
    # and is seen from elsewhere about the robot's base
    "turns": ("--start_spread", "0.3", "--turn_spread", "40"),
    # the recipe's without grasps that fail, cameras put as by hand, turned cameras, other starts
    "without_mistakes": ("--mistake_rate", "0"),
    "without_hand": ("--loose_camera", "0"),
    "without_turns": ("--turn_spread", "0"),
    "without_starts": ("--start_spread", "0"),
}
# dict.fromkeys: each name once, in the order of the columns
CELLS = list(
    dict.fromkeys(column.cell(layout) for column in COLUMNS.values() for layout in column.layouts)
)
