"""Waypoints beyond the image's edge: volumes whose margin of cells reaches there."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SIZE, agentview
from test_contract import Case, answers, loss, predict

import camera
from figures import plots
from harness.hints import cells_beyond, said_of_margin
from registry import REGISTRY
from waypoint import Waypoint

MARGIN = 3
WITH_VOLUME = [name for name, entry in REGISTRY.items() if hasattr(entry.config, "margin")]


def with_margin(case, margin=MARGIN):
    """The case, its policy's volume with so many cells beyond each edge."""
    case.config = dataclasses.replace(case.config, margin=margin)
    case.dataset.config = case.config
    return case


@pytest.fixture(scope="module", params=WITH_VOLUME)
def case(request, synthetic_demos, backbone, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return with_margin(Case(request.param, synthetic_demos, backbone, cache))


@pytest.fixture
def para(synthetic_demos, backbone, tmp_path):
    return Case("para", synthetic_demos, backbone, tmp_path)


def points_beyond(policy, batch, cells=2.3):
    """World points (4,3), `cells` cells beyond the left, right, upper and lower edge, each seen by
    the batch's camera, and their pixels (4,2)."""
    c, middle = policy.config, SIZE / 2
    far = cells * SIZE / c.grid
    pixels = [(-far, middle), (SIZE + far, middle), (middle, -far), (middle, SIZE + far)]
    u, v = torch.tensor(pixels, dtype=torch.float64).T
    height = policy.height_range.mean()
    K, E = (batch[k].flatten(0, -3)[:4] for k in "KE")
    return camera.unproject(u, v, height, K, E), torch.stack([u, v], -1)


def cameras_of(batch):
    return {k: batch[k].flatten(0, -3)[:4] for k in "KE"}


def decoded(policy, points, cameras):
    """What a perfect classifier of a policy's volume answers for points (N,3)."""
    index, share = policy.volume_targets(policy.coordinates(points, cameras))
    shape = (len(points), np.prod(policy.volume_shape))
    # logits whose softmax is the target itself
    logits = torch.full(shape, -torch.inf).scatter(1, index, share.log())
    coordinates, _ = policy.decode_volume(logits.view(-1, 1, *policy.volume_shape))
    return policy.points(coordinates, cameras)


def test_points_beyond_the_edge_come_back_within_a_cell(case):
    """Encoded and decoded, a point beyond any edge is where it was, within a cell and a bin.

    Without the margin its answer lies at the image's border, cells away.
    """
    batch = case.batch()
    policy, cameras = case.policy(), cameras_of(batch)
    points, pixels = points_beyond(policy, batch)
    shown = lambda points: torch.stack(camera.project(points, cameras["K"], cameras["E"])[:2], -1)
    found = decoded(policy, points, cameras)
    cell = SIZE / case.config.grid
    assert (shown(found) - pixels).abs().max() <= cell
    low, high = policy.height_range
    assert (found - points)[:, 2].abs().max() <= (high - low) / case.config.n_height_bins
    config = dataclasses.replace(case.config, margin=0)
    plain = case.entry.policy(config, case.backbone.channels)
    plain.fit_statistics(case.statistics)
    apart = (shown(decoded(plain, points, cameras)) - pixels).norm(dim=-1)
    assert (apart > 1.5 * cell).all()


def test_cells_of_the_margin_learn(case):
    """A waypoint beyond the edge moves the features of the margin's cells, out to the last ones."""
    policy, batch = case.policy().train(), case.batch()
    points, _ = points_beyond(policy, batch)
    kept = []
    trunk = policy.key_trunk if hasattr(policy, "key_trunk") else policy.trunk

    def keep(module, inputs, out):
        out.retain_grad()
        kept.append(out)

    trunk[-1].register_forward_hook(keep)
    batch["target_pos"] = points[0].expand_as(batch["target_pos"])
    loss(policy, batch)["loss"].backward()
    side = case.config.grid + 2 * MARGIN
    assert {tuple(maps.shape[2:]) for maps in kept} == {(side, side)}
    # (H,W): of all samples and channels
    moved = sum(maps.grad.abs().sum((0, 1)) for maps in kept)
    assert moved[:, 0].min() > 0 and moved[0].min() > 0
    # most of all where the waypoint is: left of the image, in its margin
    assert moved.flatten().argmax() % side < MARGIN


def test_a_margin_changes_no_shape_of_a_prediction(case):
    """A policy with a margin decides in closed loop and answers batches as any other."""
    out, batch = predict(case.policy(), case.batch()), case.batch()
    assert out["position"].shape == batch["target_pos"].shape
    assert torch.isfinite(out["position"]).all()
    for waypoint in answers(case.policy(), case.observations()):
        assert np.isfinite(waypoint.trajectory).all()


def test_without_a_margin_cells_are_those_of_the_image(case):
    """At 0, the default, geometry and weights are to the bit those of before there was a margin."""
    config = dataclasses.replace(case.config, margin=0)
    assert type(config)().margin == 0 and config.side == config.grid
    policy = case.entry.policy(config, case.backbone.channels)
    policy.fit_statistics(case.statistics)
    batch = case.batch()
    points, cameras = batch["target_pos"].flatten(0, -2)[:4], cameras_of(batch)
    u, v, _ = camera.project(points, cameras["K"], cameras["E"])
    plain = [camera.pixel_to_cell(x, config.grid, SIZE) for x in (v, u)]
    assert torch.equal(policy.cells(points, cameras), torch.stack(plain, -1))
    # weights are the image's, so a policy can be finetuned with a margin
    shapes = lambda policy: {k: v.shape for k, v in policy.state_dict().items()}
    assert shapes(policy) == shapes(case.policy())


def test_a_policy_learns_to_answer_beyond_the_edge(para):
    """Trained on one waypoint beyond the edge, PARA answers it, where one without a margin ends at
    the border."""
    errors = {}
    for margin in (0, MARGIN):
        case = with_margin(para, margin)
        policy, batch = case.policy().train(), case.batch()
        points, _ = points_beyond(policy, batch)
        batch["target_pos"] = points[0].expand_as(batch["target_pos"])
        optimiser = torch.optim.Adam(policy.parameters(), 0.02)
        for _ in range(40):
            optimiser.zero_grad()
            policy.loss(batch)["loss"].backward()
            optimiser.step()
        found = predict(policy, batch)["position"]
        errors[margin] = (found - points[0]).norm(dim=-1).median().item()
    assert errors[MARGIN] < 0.05 < errors[0], errors


def test_the_oracle_answers_beyond_the_edge():
    """With a margin the oracle's point is as near beyond the edge as inside; without, it is the
    border's."""
    K, E = agentview(SIZE)
    args = (16, SIZE, 0.9, 1.3, 32)
    point = camera.unproject(np.float64(-9.0), np.float64(30.0), 1.05, K, E)
    u = lambda point: camera.project(point, K, E)[0]
    assert abs(u(camera.quantise(point, K, E, *args, margin=MARGIN)) + 9) <= SIZE / 16 / 2
    assert u(camera.quantise(point, K, E, *args)) > 0
    # farther off than the margin: its outermost cell
    far = camera.unproject(np.float64(-90.0), np.float64(30.0), 1.05, K, E)
    assert u(camera.quantise(far, K, E, *args, margin=MARGIN)) == pytest.approx(-10.0)


@pytest.mark.parametrize("name", ["para", "autoregressive", "act"])
def test_targets_beyond_the_image_are_counted(name, synthetic_demos, backbone, tmp_path):
    """A training says how many of its targets the image does not show, and which margin would hold
    them."""
    case = Case(name, synthetic_demos, backbone, tmp_path)
    dataset = case.dataset
    assert said_of_margin(dataset) is None
    dataset.K[:, 0, 2] -= 30
    if name == "act":
        assert said_of_margin(dataset) is None
        return
    # target by target, as defined
    expected = []
    demos = dataset.row_demo if name == "autoregressive" else dataset.demo
    for demo, points, masks in zip(demos, dataset.target_pos, dataset.mask):
        for point, mask in zip(points.numpy(), masks):
            u, *_ = camera.project(point, dataset.K[demo].numpy(), dataset.E[demo].numpy())
            expected += [max(0, -u, u - SIZE) * case.config.grid / SIZE] if mask > 0 else []
    np.testing.assert_allclose(cells_beyond(dataset), expected)
    n, most = np.count_nonzero(expected), max(expected)
    assert 0 < n < len(expected)
    sentence = said_of_margin(dataset)
    assert f"{n} of {len(expected)} targets" in sentence
    assert f"--margin {int(np.ceil(most))} holds them" in sentence
    assert f"with --margin 0 {n} of them" in sentence
    assert "all are held" in said_of_margin(with_margin(case, int(np.ceil(most))).dataset)


def test_a_waypoint_beyond_the_edge_is_drawn():
    """It is a hollow dot at the image's edge in a film, and in the frame of a picture."""
    K, E = agentview(SIZE)
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    for u in (-9.0, 20.0):
        point = camera.unproject(np.float64(u), np.float64(30.0), 1.05, K, E)
        plan = Waypoint(point, None, 1.0, point[None], np.array([1.0]))
        drawn = plots.draw_plan(image, plan, K, E)
        columns = np.flatnonzero(drawn.any((0, 2)))
        assert columns.min() == max(0, int(u) - 5) and columns.max() - columns.min() == 10
        middle = drawn[30, columns[5]]
        assert (middle == (255, 255, 255)).all() == (u < 0)
    figure, axis = plots.plt.subplots()
    beyond = plots.framed(axis, SIZE, [[-9.0, 30.0], [20.0, 30.0], [30.0, 1000.0]])
    assert beyond == 2 and axis.get_xlim()[0] < -9 and axis.get_ylim()[0] < 2 * SIZE
    assert plots.framed(axis, SIZE, [[20.0, 30.0]]) == 0
    assert axis.get_xlim() == (0, SIZE) and axis.get_ylim() == (SIZE, 0)
    plots.plt.close(figure)


OPTIONS = {
    "A's MLP": ("autoregressive", {"head": "mlp"}),
    "A's other parts": (
        "autoregressive",
        {"key_patches": True, "rays": True, "coarse_to_fine": True, "smooth_weight": 0.1},
    ),
    "D's cell embeddings": ("dino_volume_kv_full", {"yx_embedding": True}),
    "PARA with rays": ("para", {"rays": True, "gripper_head": "separate"}),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_optional_parts_reach_the_margin(options, synthetic_demos, backbone, tmp_path):
    """Parts that a flag adds have the margin's cells too, and learn from a waypoint there."""
    name, flags = OPTIONS[options]
    case = with_margin(Case(name, synthetic_demos, backbone, tmp_path))
    case.config = dataclasses.replace(case.config, **flags)
    policy, batch = case.policy(), case.batch()
    points, _ = points_beyond(policy, batch)
    batch["target_pos"] = points[3].expand_as(batch["target_pos"])
    out = loss(policy, batch)["loss"]
    out.backward()
    assert torch.isfinite(out)
    assert torch.isfinite(predict(policy, batch)["position"]).all()
    answers(policy, case.observations())
