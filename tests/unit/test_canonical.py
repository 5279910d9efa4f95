"""One view of the workspace for all cameras: geometry, images, every policy that is given it."""

import dataclasses
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIZE, agentview, observations_of, write_synthetic_demos
from helpers import run, train_flags
from safetensors.torch import load_file
from test_contract import Case, answers, same

import camera
import canonical
import eval as eval_script
from camera import look_at
from formats.dataset import open_dataset
from formats.demos import mirrored, seen_as
from harness.checkpoint import load_policy, save_policy
from harness.finetune import checked
from harness.sessions import PolicySessions
from harness.validation import free_run
from policy import PolicyConfig
from registry import REGISTRY
from rot_utils import rotvec_to_matrix
from runtime import UserError
from sim import moved_cameras
from sim.asked import refuse_without_meaning
from sim.rollout import ExpertPath, OracleAgent

VIEW = "-0.05 0.02 0.95 80"


def turned(E, *degrees):
    """Camera-to-world E turned in place about its own axes."""
    moved = E.copy()
    moved[:3, :3] = E[:3, :3] @ rotvec_to_matrix(np.radians(degrees))
    return moved


def cameras(seed, n=20):
    """Cameras (K, E) as demonstrations draw them, also rolled and zoomed."""
    rng, (K, E) = np.random.default_rng(seed), agentview()
    for _ in range(n):
        moved = moved_cameras.moved(E, moved_cameras.drawn(rng, 1, unmoved=0)[0])
        zoomed = K @ np.diag([*[rng.uniform(0.7, 1.5)] * 2, 1])
        zoomed[:2, 2] += rng.uniform(-5, 5, 2)
        yield zoomed, turned(moved, 0, 0, rng.uniform(-30, 30))


def before(demo, E):
    """A demonstration before another camera."""
    return dataclasses.replace(demo, E=E)


def test_all_cameras_of_a_place_become_one():
    """Turned, rolled and zoomed in place, a camera has the same view; it looks at the point,
    upright, and a metre there has the pixels that the view says.
    """
    point, scale = canonical.parsed(VIEW)
    for K, E in cameras(0):
        one_K, one_E, warp = canonical.camera_of(K, E, SIZE, VIEW)
        assert warp and camera.fault(one_K, one_E, (SIZE, SIZE)) is None
        u, v, depth = camera.project(point, one_K, one_E)
        np.testing.assert_allclose([u, v], SIZE / 2)
        assert one_E[2, 0] == pytest.approx(0, abs=1e-9)  # its right is level
        assert one_K[0, 0] / depth == pytest.approx(scale)
        np.testing.assert_allclose(one_E[:3, 3], E[:3, 3])
        other = canonical.camera_of(K @ np.diag([1.2, 1.2, 1]), turned(E, 8, -5, 20), SIZE, VIEW)
        np.testing.assert_allclose(other[0], one_K)
        np.testing.assert_allclose(other[1], one_E)
        # seen once more it is what it is
        assert canonical.camera_of(one_K, one_E, SIZE, VIEW)[2] == ()


def test_the_warp_goes_from_new_pixels_to_old_ones():
    """Wherever a point of the world is, the new camera's pixel is warped to the old one's."""
    rng = np.random.default_rng(1)
    for K, E in cameras(1):
        one_K, one_E, warp = canonical.camera_of(K, E, SIZE, VIEW)
        points = rng.uniform([-0.3, -0.3, 0.9], [0.2, 0.3, 1.3], (50, 3))
        u, v, _ = camera.project(points, one_K, one_E)
        old = np.reshape(warp, (3, 3)) @ np.stack([u, v, np.ones(50)])
        np.testing.assert_allclose(old[:2] / old[2], camera.project(points, K, E)[:2], atol=1e-6)


def test_an_image_shows_things_where_the_new_camera_has_them():
    """A dot in the world, drawn where the old camera sees it, is where the new one does, within a
    third of a pixel; what the old one does not see is the grey of no features.
    """
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for K, E in cameras(2):
        one_K, one_E, warp = canonical.camera_of(K, E, SIZE, VIEW)
        dot = np.array([0.0, 0.05, 0.95])
        (u, v, _), (new_u, new_v, _) = (camera.project(dot, *c) for c in ((K, E), (one_K, one_E)))
        image = np.zeros((SIZE, SIZE, 3)) + 20
        image += 200 * np.exp(-((x - u) ** 2 + (y - v) ** 2) / 8)[..., None]
        new = canonical.warped(image.astype(np.uint8), warp).astype(float)
        bright = (new[..., 0] - 20).clip(0) * (np.hypot(x - new_u, y - new_v) < 9)
        middle = (bright * x).sum() / bright.sum(), (bright * y).sum() / bright.sum()
        np.testing.assert_allclose(middle, (new_u, new_v), atol=0.34)
        old = np.reshape(warp, (3, 3)) @ np.stack([x.ravel(), y.ravel(), np.ones(SIZE**2)])
        unseen = ((old[:2] / old[2] < -2) | (old[:2] / old[2] > SIZE + 2)).any(0)
        np.testing.assert_array_equal(
            new.reshape(-1, 3)[unseen], np.tile(canonical.UNSEEN, (unseen.sum(), 1))
        )


@pytest.mark.parametrize("degrees", [100, 180])
def test_a_camera_that_looks_away_shows_nothing(degrees):
    """What lies behind the old camera has no pixel, though the projection has numbers for it."""
    K, E = agentview()
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    _, _, warp = canonical.camera_of(K, turned(E, 0, degrees, 0), SIZE, VIEW)
    assert (canonical.warped(white, warp) == canonical.UNSEEN).all()


def test_a_camera_above_the_point_keeps_its_right():
    """Straight down there is no upright: the image is not turned about its middle."""
    point, _ = canonical.parsed(VIEW)
    E = look_at(np.add(point, [1e-7, 0, 1.0]), point)
    for roll in (0, 40, 150):
        right = turned(E, 0, 0, roll)
        found = canonical.turned_to(turned(right, 4, 3, 0), point)
        assert camera.fault(agentview()[0], found) is None
        np.testing.assert_allclose(found[:3, 0], right[:3, 0], atol=0.01)


def test_fit_leaves_the_camera_that_most_demonstrations_have(synthetic_demos):
    """Its images are not touched, and have the cache's entries that they have anyway."""
    own = open_dataset(synthetic_demos).demos
    moved = [before(d, turned(d.E, 3 * i, 5, 2)) for i, d in enumerate(own, 1)]
    # the same camera, as a simulator repeats it
    again = before(own[1], own[1].E + 1e-7)
    view = canonical.fitted([moved[0], own[0], *moved[1:], again])
    lowest = min(d.ee_pos[:, 2].min() for d in own)
    assert float(view.split()[2]) == pytest.approx(lowest, abs=1e-5)
    for demo in (own[0], again):
        assert seen_as(demo, view) is demo
    for demo in moved:
        seen = seen_as(demo, view)
        assert seen.key != demo.key and seen_as(seen, view) is seen
        np.testing.assert_allclose(seen.E[:3, 3], demo.E[:3, 3])
        assert np.abs(seen.images([0])[0].astype(int) - demo.images([0])[0]).mean() > 3
    # a camera that looks up does not meet the table
    up = [before(own[0], look_at(own[0].E[:3, 3], own[0].E[:3, 3] + [-1, 0, 0.1]))]
    np.testing.assert_allclose(
        canonical.parsed(canonical.fitted(up))[0], own[0].ee_pos.mean(0), atol=1e-5
    )


def test_a_mirrored_demonstration_is_warped_after_its_reflection(synthetic_demos):
    """A reflected camera's own view: the mirrored image's, wherever the principal point is."""
    demo = open_dataset(synthetic_demos).demos[0]
    demo = before(demo, turned(demo.E, 3, 8, 0))
    seen = seen_as(mirrored(demo), VIEW)
    image = np.ascontiguousarray(demo.images([0])[0][:, ::-1])
    np.testing.assert_array_equal(seen.images([0])[0], canonical.warped(image, seen.warp))


def test_of_two_views_the_last_one_counts(synthetic_demos):
    """Seen in another view before, a demonstration looks as if it had not been."""
    demo = open_dataset(synthetic_demos).demos[0]
    demo = before(demo, turned(demo.E, 3, 8, 0))
    twice, once = seen_as(seen_as(demo, "0 0 1 70"), VIEW), seen_as(demo, VIEW)
    np.testing.assert_allclose(twice.E, once.E)
    apart = np.abs(twice.images([0])[0].astype(int) - once.images([0])[0])
    assert apart.max() <= 1  # a last digit of the warp


@pytest.fixture(scope="module", params=list(REGISTRY))
def case(request, synthetic_demos, backbone, tmp_path_factory):
    """A policy in one view, and demonstrations before cameras that are turned in place."""
    made = Case(request.param, synthetic_demos, backbone, tmp_path_factory.mktemp("plain"))
    made.config = dataclasses.replace(made.config, canonical_view=VIEW)
    made.demos = [before(d, turned(d.E, 4 * i, -6, 3)) for i, d in enumerate(made.demos)]
    made.dataset = made.entry.dataset(
        made.demos, made.config, backbone, cache=tmp_path_factory.mktemp("cache"), progress=False
    )
    made.statistics = made.dataset.statistics()
    return made


@pytest.fixture(scope="module")
def para(synthetic_demos, backbone, tmp_path_factory):
    """PARA with images as they are."""
    return Case("para", synthetic_demos, backbone, tmp_path_factory.mktemp("para"))


def test_data_have_the_view(case):
    """Cameras, and the features of the images that they see."""
    batch, (point, _) = case.batch(), canonical.parsed(VIEW)
    K, E = batch["K"].flatten(0, -3).numpy(), batch["E"].flatten(0, -3).numpy()
    for k, e in zip(K, E):
        np.testing.assert_allclose(camera.project(point, k, e)[:2], [SIZE / 2] * 2, atol=1e-6)
    first = case.dataset.batch([0])
    demo, frame = case.dataset.demos[case.dataset.demo[0]], case.dataset.frame[0]
    if not case.config.has_history:
        maps = case.backbone(torch.from_numpy(demo.images([frame])))
        assert same([m[0] for m in first["features"]], [m[0] for m in maps])


def test_a_policy_sees_every_observation_in_its_view(case):
    """An observation of any camera is answered as the one that was turned and zoomed beforehand,
    bit by bit; also through sessions that compute several images together, and beside its data.
    """
    policy = case.policy()
    raw = list(observations_of(case.demos[1], (0, 5, 10)))
    seen = list(observations_of(seen_as(case.demos[1], VIEW), (0, 5, 10)))
    assert np.abs(raw[0].image.astype(int) - seen[0].image).mean() > 3
    found = answers(policy, raw)
    assert same(found, answers(policy, seen))
    plain = case.policy()
    plain.config = dataclasses.replace(case.config, canonical_view="")
    assert not same(found, answers(plain, raw))
    # as on a GPU: features of several images at once
    both = PolicySessions(policy, batch=3)
    torch.manual_seed(0)
    sessions = [both.open(), both.open()]
    (one, _), (other, _) = both.answer([(s, o[0]) for s, o in zip(sessions, (raw, seen))])
    np.testing.assert_array_equal(one.position, other.position)
    assert same(
        free_run(policy, case.demos[1], case.config)["predicted"],
        free_run(policy, case.dataset.demos[1], case.config)["predicted"],
    )


@pytest.mark.parametrize("ours", [VIEW, "", canonical.FIT])
@pytest.mark.parametrize("theirs", [VIEW, ""])
def test_finetuning_in_another_view_is_said(theirs, ours, para, capsys, tmp_path):
    """The weights fit whatever the view is, so only a word tells that images look otherwise."""
    path = tmp_path / "theirs.safetensors"
    stored = dataclasses.replace(para.config, canonical_view=theirs)
    policy = para.entry.policy(stored, para.backbone.channels).attach(para.backbone)
    save_policy(path, policy, "para", {"step": 1})
    config = dataclasses.replace(para.config, canonical_view=ours)
    got = checked(path, config, para.backbone.identity).canonical_view
    assert got == (theirs if theirs and ours == canonical.FIT else ours)
    assert ("keeps the checkpoint's" in capsys.readouterr().out) == (got != theirs)


@pytest.mark.parametrize("view", ["fi", "1 2 3", "0 0 0.9 -5", "0 0 nan 500", "0 0 0.9 500 2"])
def test_a_text_that_is_no_view_is_refused(view):
    """By train.py and by a checkpoint's config: one sentence with the remedy."""
    with pytest.raises(UserError, match="--canonical_view .*x y z scale.*or fit"):
        canonical.resolved(view, [])
    entry = REGISTRY["para"]
    with pytest.raises(UserError, match="--canonical_view"):
        entry.policy(entry.config(image_size=SIZE, canonical_view=view), [8])


def test_train_fits_it_and_the_checkpoint_keeps_it(tmp_path):
    """The view that was found, not the word: whoever loads the policy has no demonstrations."""
    path = write_synthetic_demos(tmp_path / "demos.hdf5", size=112)
    flags = train_flags(path, tmp_path / "run", 2)
    run(*flags, "--model_type", "para", "--canonical_view", "fit", cwd=tmp_path)
    policy, _, _ = load_policy(tmp_path / "run" / "checkpoint.safetensors")
    view, demo = policy.config.canonical_view, open_dataset(path).demos[0]
    assert canonical.parsed(view) and seen_as(demo, view) is demo
    assert PolicyConfig().canonical_view == ""

    # finetuned on other data it stays, and so do the features of those that were there before
    other = write_synthetic_demos(tmp_path / "other.hdf5", size=112, seed=5)
    more, old = tmp_path / "more", tmp_path / "run" / "checkpoint.safetensors"
    flags = train_flags(other, more, 2)
    assert canonical.fitted(open_dataset(other).demos) != view
    begun = ("--canonical_view", "fit", "--init_from", old)
    run(*flags, "--model_type", "para", *begun, cwd=tmp_path)
    # killed before its first save it begins again, from the checkpoint
    first = load_file(more / "state.safetensors")
    for path in (more / "state.safetensors", more / "checkpoint.safetensors"):
        path.unlink()
    done = run("train.py", "--resume", more, cwd=tmp_path)
    assert "tensors loaded by name and shape" in done.stdout
    again = load_file(more / "state.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    # later it does not need it
    old.unlink()
    run("train.py", "--resume", more, cwd=tmp_path)
    assert load_policy(more / "checkpoint.safetensors")[0].config.canonical_view == view


def test_a_checkpoint_that_does_not_go_with_the_rest_is_refused_before_features(para, tmp_path):
    """Features take minutes: nothing is in the cache when --init_from is refused."""
    save_policy(tmp_path / "theirs.safetensors", para.policy(), "para", {"step": 1})
    data = write_synthetic_demos(tmp_path / "demos.hdf5", size=112)
    for path, word in (("theirs", "was trained on the features"), ("absent", "no such checkpoint")):
        begun = ("--init_from", f"{path}.safetensors")
        flags = train_flags(data, "run", 2)
        done = run(*flags, "--model_type", "para", *begun, cwd=tmp_path, ok=False)
        assert done.returncode == 2 and word in done.stderr, done.stderr
        assert not list(tmp_path.glob("cache/**/*.npy"))


# -- the oracle


def test_the_oracle_answers_in_cells_of_the_one_view():
    """It is the ceiling of policies that see one view: its cells are that camera's. So cameras that
    were turned or zoomed in place get the same answer, which in their own cells they do not.
    """
    rng, closed = np.random.default_rng(0), np.zeros(30, dtype=int)
    positions = [-0.05, 0.02, 0.95] + 0.1 * rng.uniform(-1, 1, (30, 3))
    path = ExpertPath(positions, closed, True)

    def answer(K, E, view):
        agent = OracleAgent(grid=14, margin=3, view=view)
        agent.start(SimpleNamespace(image_size=SIZE), path)
        seen = SimpleNamespace(K=K, E=E, eef_pos=positions[3])
        return agent.act(seen, closed=0).position

    for K, E in cameras(3, n=8):
        one = canonical.camera_of(K, E, SIZE, VIEW)[:2]
        np.testing.assert_allclose(answer(K, E, VIEW), answer(*one, ""), atol=1e-6)
        assert np.abs(answer(K, E, VIEW) - answer(K, E, "")).max() > 1e-3


@pytest.mark.parametrize(
    "words, named",
    [
        ("--canonical_view fit", "no training demonstrations"),
        ("--canonical_view 1", "x y z scale"),
        (f"--policy expert --canonical_view '{VIEW}'", "expert"),
    ],
)
def test_a_view_is_given_to_the_oracle_alone(words, named):
    given = ["--policy", "oracle", *shlex.split(words)]
    args = eval_script.build_parser().parse_args(given)
    args.variant, args.grasp = "task", "side"
    with pytest.raises(UserError, match=named):
        refuse_without_meaning(args)
