"""What a grasp has to know of LIBERO's objects, and which grasp each task of its suites is given.
Metres.
"""

# Bowls are straddled at the rim: the EEF is so far from the bowl's axis, and so high over its
# origin. The second height holds weakly, and is for a bowl whose surroundings leave no other.
RIM_RADIUS = {"akita_black_bowl": 0.048}
RIM_HEIGHTS = (0.0366, 0.045)

# All else is gripped from above, the EEF so far below its top. The carton's ridge catches in an
# opening finger that is deeper, which lifts it again.
BELOW_TOP = {"orange_juice": 0.014}
BELOW_TOP_USUAL = 0.022
TIP_ROOM = 0.017  # but at least so high over the object's foot: below the EEF are the fingertips
WIDEST = 0.072  # that the fingers go around

# Objects that are too wide to be gripped: dragged over the table by their rim.
DRAGGED = ("plate",)
# the EEF's place at such a rim: from the object's axis, and over its origin
DRAG_RADIUS, DRAG_HEIGHT = 0.062, 0.0115

# The grasp of each task, by its name in sim/grasps.py: one with yaw 0 where it has room in all init
# states 0 to 9, else the one with most. Choosing anew in each layout would teach two where two are
# about as good. Where the bowl of libero_spatial_5 leans on its ramekin, it has its own rule.
PREFERRED = {
    "libero_spatial_0": "-y 0",
    "libero_spatial_1": "+y 0",
    "libero_spatial_2": "+y 0",
    "libero_spatial_3": "+y 0",
    "libero_spatial_4": "+y 45 high",
    "libero_spatial_5": "+y 0 high",
    "libero_spatial_6": "+y 90",
    "libero_spatial_7": "+y 0",
    "libero_spatial_8": "-y 0",
    "libero_spatial_9": "+y 0",
    "libero_object_1": "top -15",
    "libero_object_3": "top -15",
    "libero_object_5": "top -15",
    "libero_goal_1": "+y 0",
    "libero_goal_3": "+y 0",
    "libero_goal_4": "+y 0",
    "libero_goal_6": "top 0",
    "libero_goal_8": "+y 0",
}
# The same where another task's sentence is said: (scene, whose sentence). Without an entry it is
# that task's own. On this cabinet the bowl is at the end of the arm's reach: "+y 0" missed in 1 of
# 5 init states, 0 to 4.
PREFERRED_TOLD = {("libero_spatial_7", "libero_spatial_9"): "+y 30"}
# Tasks whose published demonstrations and results are by the plain grasp `side` of sim/expert.py.
SIDE_TASKS = ("libero_spatial_0", "libero_goal_1", "libero_goal_4")

# where the object is put aside first, that grasp
PREFERRED_ASIDE = {"libero_goal_3": "+y 0"}


def kind(name):
    """The kind of an object: akita_black_bowl for akita_black_bowl_1."""
    return name.rsplit("_", 1)[0]


def preferred_grasp(here, asked):
    """The name of the grasp for a task whose sentence is said in a scene, None where there is none.
    here, asked: keys of the scene's task and of the sentence's.
    """
    return PREFERRED_TOLD.get((here, asked), PREFERRED.get(asked))


def side_of(grasp):
    """Which side a grasp's name says: "-y", "+y", or "top"."""
    return grasp.split()[0]
