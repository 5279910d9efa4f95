"""LIBERO-Plus's variants: which there are, where their cameras, arms and objects are, and a suite
of them through eval.py. Skipped where its files are not installed (`make plus`).
"""

import ast
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from robosuite.utils.errors import RandomizationError

from camera import extrinsics_from_mujoco
from eval import EvalWorker, build_parser, prepare
from rot_utils import quat_to_matrix, rotation_angle
from runtime import UserError
from sim import plus, simulator
from sim.libero_env import OPEN, WAIT_STEPS, Scene
from sim.tasks import find_task, init_states
from study import suites

SPATIAL, OBJECT = "libero_spatial", "libero_object"
installed = pytest.mark.skipif(
    importlib.util.find_spec("liberoplus") is None, reason="make plus installs LIBERO-Plus's files"
)


def test_missing_files_are_an_error_with_its_remedy(monkeypatch):
    """Without the optional wheel one sentence says how to install it, before any simulator
    starts.
    """
    plus.wheel.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; run `make plus`, see docs/libero_plus.md"):
        plus.agree(flags("--plus camera"))


def flags(words):
    return build_parser().parse_args(words.split())


@installed
@pytest.mark.parametrize(
    "suite, counts",
    [(SPATIAL, (376, 350, 177)), (OBJECT, (396, 398, 195)), ("libero_goal", (408, 409, 185))],
)
def test_variants_are_as_many_as_published(suite, counts):
    """Cameras and robot starts are as many as its own classification counts, layouts as many as
    need no further assets. Each belongs to a task of the suite, and has its files.
    """
    found = [plus.variants(suite, kind) for kind in ("camera", "robot", "layout")]
    assert tuple(map(len, found)) == counts
    assert len({v.name for kind in found for v in kind}) == sum(counts)
    task = find_task(suite, 0)
    for variant in found[2]:
        made = plus.variant_task(task, variant)
        assert made.bddl.startswith(str(plus.wheel())) and made.key == task.key
        assert all(plus.Path(path).is_file() for path in (made.bddl, made.states))
    assert [v.name for v in plus.variants(suite, "robot_joints")] == [v.name for v in found[1]]


@installed
def test_the_first_n_are_the_same_and_spread_over_tasks():
    """A longer look begins with the shorter one, task by task, so that a run can be extended."""
    tasks = [find_task(SPATIAL, index) for index in range(10)]
    short, whole = (plus.chosen(SPATIAL, "camera", tasks, n) for n in (40, None))
    assert sum(map(len, short.values())) == 40 and sum(map(bool, short.values())) >= 8
    assert sum(map(len, whole.values())) == 376
    for index, variants in short.items():
        assert whole[index][: len(variants)] == variants
    # named alone, a task has the same variants
    assert plus.chosen(SPATIAL, "camera", tasks[3:4])[3] == whole[3]


@installed
def test_sentences_are_those_of_its_files(scene):
    """Every variant of `language` says something else than the task, and the scene says it. Some
    keep the task's nouns, others have other words for them.
    """
    found = plus.variants(SPATIAL, "language")
    assert len(found) == 390
    sentences = {v.name: v.sentence for v in found}
    assert all(sentences.values()) and len(set(sentences.values())) > 380
    groups = [v.group for v in found]
    assert set(groups) == {"its own nouns", "other nouns"}
    assert 100 < groups.count("its own nouns") < 300
    own = next(v for v in found if v.task == scene.task.name)
    before = scene.instruction
    try:
        plus.place(scene, own)
        assert scene.instruction == own.sentence != scene.task.language
        assert scene.observe(image=False).instruction == own.sentence
        assert own.described()["instruction"] == own.sentence
    finally:
        scene.instruction = before


def its_camera(scene, variant):
    """Camera-to-world (4,4) by LIBERO-Plus's own code of a kind of scene. It is cut out of its
    file, whose imports are not all here.
    """
    text = (plus.wheel() / "envs" / "problems" / f"libero_{scene}_manipulation.py").read_text()
    # the helpers and the first class; variants with other textures follow
    first = "@register_problem".join(text.split("@register_problem")[:2])
    helpers = {"rotate_around_y", "rotate_around_z", "scale_distance_from_pivot"}
    nodes = ast.parse(first).body
    code = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name in helpers]
    methods = [n for n in nodes if isinstance(n, ast.ClassDef)][-1].body
    code += [n for n in methods if getattr(n, "name", "") == "_setup_camera"]
    from scipy.spatial.transform import Rotation

    names = {"np": np, "Rotation": Rotation}
    exec(compile(ast.Module(code, []), "LIBERO-Plus", "exec"), names)
    poses = {}
    arena = SimpleNamespace(
        set_camera=lambda camera_name, pos, quat, **rest: poses.update({camera_name: (pos, quat)})
    )
    turned, tilted, percent, pan, pitch = map(str, variant.view)
    problem = SimpleNamespace(
        horizon_view=turned,
        vertical_view=tilted,
        scale_factor=int(percent) / 100,
        end_point_rot=pan,
        end_point_vertical=pitch,
    )
    names["_setup_camera"](problem, arena)
    position, (w, *xyz) = poses["agentview"]
    quat = np.array([*xyz, w]) / np.linalg.norm([*xyz, w])
    return extrinsics_from_mujoco(np.array(position), quat_to_matrix(quat))


@installed
@pytest.mark.parametrize("suite, scene", [(SPATIAL, "tabletop"), (OBJECT, "floor")])
def test_cameras_are_those_of_its_own_code(suite, scene):
    """Ten variants, of every way in which cameras are moved, have the pose that LIBERO-Plus's own
    code gives them.
    """
    language = find_task(suite, 0).language
    of_group = {}
    for variant in plus.variants(suite, "camera"):
        of_group.setdefault(variant.group, variant)
    ten = list(of_group.values()) + plus.variants(suite, "camera")
    for variant in ten[:10]:
        theirs = its_camera(scene, variant)
        np.testing.assert_allclose(plus.agentview(variant, language), theirs, atol=1e-12)
    # ten cameras, and none is LIBERO's own
    poses = {tuple(plus.agentview(v, language).ravel()) for v in ten[:10]}
    unmoved = plus.Variant("", "camera", suite, "")
    assert len(poses) == 10 and tuple(plus.agentview(unmoved, language).ravel()) not in poses
    assert len(of_group) == 10


@installed
def test_the_real_camera_is_in_the_observation(scene):
    """A camera variant's pose is in the observation's extrinsics and changes its picture; the next
    variant of another kind has LIBERO's camera again.
    """
    far = next(v for v in plus.variants(SPATIAL, "camera") if v.task == scene.task.name)
    state = plus.place(scene, plus.Variant("", "robot_joints", SPATIAL, scene.task.name, start=7))
    scene.set_state(state)
    usual = scene.observe()
    np.testing.assert_allclose(usual.joint_pos, plus.start_joints()[7], atol=1e-12)
    scene.set_state(plus.place(scene, far))
    moved = scene.observe()
    np.testing.assert_allclose(moved.E, its_camera("tabletop", far), atol=1e-6)
    assert np.abs(moved.E - usual.E).max() > 0.01
    assert np.abs(moved.image.astype(int) - usual.image).mean() > 5
    # what the variant before set is gone: the arm is the init state's, and so is its posture
    np.testing.assert_allclose(moved.joint_pos, scene.init_states()[0][1:8], atol=1e-12)
    assert scene.posture is None
    scene.set_view(plus.settings.Condition())


@installed
def test_flags_that_mean_nothing_with_it_are_refused():
    """LIBERO-Plus has its own scenes, and no 90-task suite."""
    for words, named in (("--layout shifted", "layout"), ("--clean_scene", "clean_scene")):
        with pytest.raises(UserError, match=f"--plus layout and --{named}"):
            plus.agree(flags(f"--plus layout {words}"))
    with pytest.raises(UserError, match="LIBERO-Plus has no libero_90; choose of libero_spatial"):
        plus.variants("libero_90", "camera")
    args = flags("--plus robot --task_id 3")
    plus.agree(args)
    assert (args.task_ids, args.task_id) == ([3], None)


@installed
def test_an_episode_of_a_layout(tmp_path, monkeypatch):
    """A worker takes the scene of the layout's BDDL and its single init state, which is not
    LIBERO's. The expert succeeds there, and the row says which variant it was.
    """
    monkeypatch.chdir(tmp_path)
    args = flags("--plus layout --task_id 0 --policy expert --image_size 64 --n_videos 0")
    plus.agree(args)
    base = find_task(SPATIAL, 0)
    variant = plus.chosen(SPATIAL, "layout", [base])[0][0]
    task = plus.variant_task(base, variant)
    assert init_states(task).shape == (1, init_states(base).shape[1])
    assert np.abs(init_states(task)[0] - init_states(base)[0]).max() > 0.005
    one = suites.of_one(args, base, tmp_path, {})
    one.n_episodes = 1
    prepare(one)
    worker = EvalWorker(one)
    row = worker.run(0)
    assert worker.scene.task == task
    worker.close()
    assert (row["success"], row["layout"], row["plus_variant"]) == (
        True,
        "plus_layout",
        variant.name,
    )
    assert row["group"] == f"level {variant.level}" and row["init_state"] == 0
    # its group is a row of the suite's table
    (group,) = suites.groups([row], 280)["groups"]
    assert (group["group"], group["n"], group["success"]) == (row["group"], 1, 1)


@installed
def test_a_scene_that_cannot_be_built_costs_its_episode_alone(tmp_path, monkeypatch):
    """The worker goes on with the next episode, of the scene that it had closed or of another."""
    monkeypatch.chdir(tmp_path)
    args = flags("--plus layout --task_id 0 --policy expert --image_size 64 --n_videos 0")
    plus.agree(args)
    one = suites.of_one(args, find_task(SPATIAL, 0), tmp_path, {})
    prepare(one)
    worker = EvalWorker(one)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "scene_of", lambda task: 1 / 0)
        assert "ZeroDivisionError" in worker.run(1)["stopped"]
    assert worker.run(0)["success"]
    worker.close()
    worker.close()
    assert worker.scene.closed


@installed
def test_a_draw_of_a_scene_that_fails_is_drawn_anew(monkeypatch):
    """Where things stand close the first draw finds no room for all of them; LIBERO's reset goes on
    drawing, and so does the Scene.
    """
    base = find_task(OBJECT, 7)
    name = f"{base.name}_level4_sample3"
    (variant,) = (v for v in plus.variants(OBJECT, "layout") if v.name == name)
    task = plus.variant_task(base, variant)
    monkeypatch.setattr(simulator, "DRAWS", 1)
    with pytest.raises(RandomizationError):
        Scene(task=task, rendering=False)
    monkeypatch.undo()
    made = Scene(task=task, rendering=False)
    assert len(plus.place(made, variant)) == 1 + made.sim.model.nq + made.sim.model.nv
    made.close()


@installed
def test_arms_start_as_in_published_evaluations(scene):
    """After the waiting steps joints and hand are where an environment has them that was built with
    the variant's robot, reset, and given the init state.
    """
    start, state = 450, scene.init_states()[0]
    variant = plus.Variant("", "robot", SPATIAL, scene.task.name, start=start)
    scene.begin_episode(plus.place(scene, variant))
    ours = scene.observe(image=False)
    scene.set_posture()
    scene.begin_episode(state)
    usual = scene.observe(image=False)
    # theirs: the robot is built at other joints, then its joints are put back with the init state
    built = scene.env.env.robot_configs[0]
    built["initial_qpos"] = plus.start_joints()[start]
    scene.reset([0])
    scene.env.set_init_state(state)
    for _ in range(WAIT_STEPS):
        scene.step([0, 0, 0, 0, 0, 0, OPEN])
    theirs = scene.observe(image=False)
    del built["initial_qpos"]
    scene.reset([0])
    np.testing.assert_allclose(ours.joint_pos, theirs.joint_pos, atol=0.02)
    assert np.degrees(rotation_angle(ours.eef_rot, theirs.eef_rot)) < 1
    assert np.degrees(rotation_angle(usual.eef_rot, theirs.eef_rot)) > 25
    assert np.linalg.norm(ours.eef_pos - usual.eef_pos) < 0.05
