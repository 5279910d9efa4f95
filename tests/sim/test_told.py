"""Another task's sentence in a task's scene, in the real simulator: the named bowl is picked,
judged, recorded, replayed and counted.
"""

import pytest

import collect_demos
import eval as evaluation
from formats.libero_hdf5 import LiberoFile
from formats.parts import merge, part_path
from runtime import UserError
from sim import collected, instructions
from sim.grasps import YAWS
from sim.handling import LIFTED
from sim.libero_env import Scene
from sim.object_facts import PREFERRED_TOLD
from sim.recording import ExpertWorker
from sim.replay import ReplayWorker
from sim.simulator import simulator_versions
from sim.tasks import find_task

OWN, OTHER = "akita_black_bowl_1", "akita_black_bowl_2"
BETWEEN, BESIDE = "between the plate and the ramekin", "next to the ramekin"


@pytest.fixture(scope="module")
def scene():
    """libero_spatial 0 with all its objects, in small pictures."""
    scene = Scene("libero_spatial", 0, image_size=64, render="fast")
    yield scene
    scene.close()


@pytest.fixture
def request_of_other(scene):
    yield instructions.request(scene.task, "other")
    scene.ask_for()


def on_plate(scene, name):
    """A state in which this bowl stands on the plate."""
    state = scene.init_states()[0].copy()
    plate = state[scene._address("plate_1")]
    x, y, z = plate[:3]
    state[scene._address(name)][:3] = x, y, z + 0.03
    return state


def test_the_predicate_judges_the_named_bowl(scene, request_of_other):
    """LIBERO's own is about the first bowl, whatever was asked for."""
    judged = {}
    for name in (OWN, OTHER):
        scene.begin_episode(on_plate(scene, name))
        for request in (None, request_of_other):
            scene.ask_for(request)
            judged[name, scene.pick] = scene.success()
    assert judged == {(a, b): a == b for a in (OWN, OTHER) for b in (OWN, OTHER)}
    # a layout that is drawn anew is judged in the same way
    scene.reset([3])
    assert scene.pick == scene.subject == OTHER and BESIDE in scene.observe(image=False).instruction
    scene.ask_for()
    assert scene.pick == scene.subject == OWN and BETWEEN in scene.observe(image=False).instruction
    lacking = instructions.Request(scene.task, "mug_1", ("on", "mug_1", "plate_1"))
    with pytest.raises(UserError, match="scene of libero_spatial_0 has no mug_1"):
        scene.ask_for(lacking)
    assert scene.pick == OWN


@pytest.fixture(scope="module")
def recorded(scene, tmp_path_factory):
    """A file of two demonstrations of one scene, of its own sentence and of the other bowl's."""
    folder = tmp_path_factory.mktemp("told")
    words = "--instruction_of other --no-clean_scene --frame_stride 8 --grasp planned"
    args = collect_demos.build_parser().parse_args(words.split())
    args.task_suite = "libero_spatial"
    collected.fill_spreads(args)
    worker = ExpertWorker(args, folder)
    worker.scenes = {False: scene}
    for index in (0, 1):
        worker.run(index)
    scene.ask_for()
    attributes = collect_demos.file_attributes(args, scene.task, simulator_versions(), {})
    out = folder / "both.hdf5"
    merge([part_path(folder, i) for i in (0, 1)], out, attributes, {})
    return out


def check_demonstrations(path, scene):
    """Each demonstration says its sentence, and ends with the bowl on the plate that it names."""
    demos = LiberoFile(path).demos
    for demo, place, pick in zip(demos, (BETWEEN, BESIDE), (OWN, OTHER)):
        assert place in demo.instruction and demo.attrs["pick"] == pick
        assert demo.task == "libero_spatial_0"
        scene.set_state(demo.states[-1])
        done = {}
        for name, asked in ((OWN, None), (OTHER, "other")):
            scene.ask_for(instructions.request(scene.task, asked))
            done[name] = scene.success()
        assert done == {OWN: pick == OWN, OTHER: pick == OTHER}
        heights = demo.states[:, scene._address(pick)][:, 2]
        assert heights.max() > heights[0] + LIFTED
    scene.ask_for()


def test_both_bowls_are_demonstrated_in_one_scene(recorded, scene):
    """The picture is the same, the sentence tells which."""
    check_demonstrations(recorded, scene)


def test_a_replay_keeps_the_sentences(recorded, scene, tmp_path):
    """Judged for the task's own bowl, the other one's demonstration would count as failed."""
    args = collect_demos.build_parser().parse_args(["--replay", str(recorded)])
    args.replay = str(recorded)
    args.frame_stride, args.grasp = 40, "side"
    collect_demos.take_from_replayed(args)
    assert (args.instruction_of, args.instruction_share) == ("other", 0.5)
    worker = ReplayWorker(args, tmp_path)
    worker.scenes = {False: scene}
    failed = [worker.run(index)["not_successful_at_the_end"] for index in (0, 1)]
    scene.ask_for()
    assert failed == [0, 0]
    attributes = collect_demos.file_attributes(args, scene.task, simulator_versions(), {})
    out = tmp_path / "again.hdf5"
    merge([part_path(tmp_path, i) for i in (0, 1)], out, attributes, {})
    check_demonstrations(out, scene)


def test_an_evaluation_counts_the_named_bowl(scene, monkeypatch, tmp_path):
    """The expert is told of the other bowl, brings it, and that is the success."""
    words = f"--policy expert --instruction_of other --n_episodes 1 --n_videos 0 --out {tmp_path}/a"
    args = evaluation.build_parser().parse_args(words.split())
    evaluation.prepare(args)
    assert args.grasp == "planned"
    monkeypatch.setattr(evaluation, "Scene", lambda **given: scene)
    monkeypatch.chdir(tmp_path)  # its cache of paths
    row = evaluation.EvalWorker(args).run(0)
    scene.ask_for()
    assert row["success"] and row["named"] == row["first_lifted"] == OTHER
    assert row["coverage_8px"] > 0.9  # of the path to that bowl


def test_every_preferred_grasp_of_a_told_scene_exists():
    """No name in the table is misspelt."""
    for (here, said), name in PREFERRED_TOLD.items():
        suite, _, index = here.rpartition("_")
        request = instructions.request(find_task(suite, int(index)), int(said.rpartition("_")[2]))
        assert request.task.key == said and int(name.split()[1]) in YAWS
