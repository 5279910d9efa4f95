"""What is special to PARA: its cells' knowledge of the camera."""

import numpy as np
import pytest
import torch
from conftest import SIZE, agentview

import camera
from formats.dataset import open_dataset
from model import ParaConfig, TrajectoryHeatmapPredictor
from registry import look_up
from sim.settings import orbit, turned


@pytest.fixture(scope="module")
def fitted(synthetic_demos, backbone, tmp_path_factory):
    """An untrained PARA with --rays, and a batch in which two cameras are moved."""
    torch.manual_seed(0)
    config = ParaConfig(
        backbone="efficientnet_lite0",
        image_size=SIZE,
        n_window=3,
        grid=16,
        n_height_bins=8,
        n_rot_bins=8,
        width=16,
        rays=True,
    )
    dataset = look_up("para").dataset(
        open_dataset(synthetic_demos).demos,
        config,
        backbone,
        cache=tmp_path_factory.mktemp("cache"),
        progress=False,
    )
    policy = TrajectoryHeatmapPredictor(config, backbone.channels).attach(backbone)
    policy.fit_statistics(dataset.statistics())
    batch = dataset.batch(np.linspace(0, len(dataset) - 1, 4).astype(int))
    batch["E"][:2] = torch.from_numpy(
        np.stack([orbit(agentview()[1], 20, 90), orbit(agentview()[1], 10, 200)])
    )
    return policy, batch


def test_a_cell_knows_where_its_ray_passes_and_goes(fitted):
    """The ray features equal points that the same cells decode to, at the EEF's height and one
    height bin above, along the camera's right and ahead of it.
    """
    policy, batch = fitted
    rays, grid = policy.cell_rays(batch), policy.config.grid
    assert rays.shape == (4, 4, grid, grid) and rays.dtype == torch.float32
    y, x = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    at = lambda z: policy.points(torch.stack([z.expand(grid, grid), y, x], -1), single)  # (H,W,3)
    for i in range(4):
        single = {k: batch[k][i] for k in "KE"}
        height = camera.height_to_bin(
            batch["eef_pos"][i, 2], *policy.height_range, policy.config.n_height_bins
        )
        low, high = at(height), at(height + 1)
        # the floor's axes as the camera has them: right, and where it looks
        right, look = single["E"][:2, 0], single["E"][:2, 2]
        axes = torch.stack([right / right.norm(), look / look.norm()])
        going = (low - high) / (low - high).norm(dim=-1, keepdim=True)
        table = low[..., :2].norm(dim=-1) < 0.4  # farther cells are clamped
        for channels, vectors in (
            (rays[i, 2:], 4 * going),
            (rays[i, :2], 10 * (low - batch["eef_pos"][i])),
        ):
            torch.testing.assert_close(
                channels.permute(1, 2, 0)[table],
                (vectors[..., :2] @ axes.T)[table].float(),
                atol=2e-4,
                rtol=1e-4,
            )


def test_rays_do_not_tell_where_in_the_world_the_camera_looks(fitted):
    """Turned about the vertical with all that is seen, a camera has the same rays: that training
    was on one half of the table cannot be told by them.
    """
    policy, batch = fitted
    turn = torch.from_numpy(turned(np.eye(4), 70, [-0.66, 0.0]))
    eef = batch["eef_pos"] @ turn[:3, :3].T + turn[:3, 3]
    moved = {**batch, "E": turn @ batch["E"], "eef_pos": eef}
    torch.testing.assert_close(
        policy.cell_rays(moved), policy.cell_rays(batch), atol=1e-4, rtol=1e-4
    )


def test_rays_are_finite_above_the_horizon(fitted):
    """A camera level with the table has rays that never descend. Their numbers stay bounded."""
    policy, batch = fitted
    level = {**batch, "E": batch["E"].clone()}
    # looks along -x, image rows downwards
    level["E"][:, :3, :3] = level["E"].new_tensor([[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    assert policy.cell_rays(level).abs().max() <= 20


def test_with_rays_a_moved_camera_changes_the_answer(fitted):
    """With image, EEF cell and height fixed, PARA gives the same answer for every camera.

    With --rays it does not, and the rays' layers learn.
    """
    policy, batch = fitted
    K, E = batch["K"], batch["E"].clone()
    u, v, _ = camera.project(batch["eef_pos"], K, E)
    E[:] = torch.from_numpy(orbit(agentview()[1], 25, 270))
    moved = {**batch, "E": E, "eef_pos": camera.unproject(u, v, batch["eef_pos"][:, 2], K, E)}
    volume = lambda p, b: p.eval().volume_logits(p.trunk_features(b))
    with torch.no_grad():
        assert (volume(policy, batch) - volume(policy, moved)).abs().max() > 1e-3
    policy.train()(batch)["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in policy.rays.parameters())
    rays, policy.rays = policy.rays, None
    with torch.no_grad():
        torch.testing.assert_close(volume(policy, batch), volume(policy, moved))
    policy.rays = rays
