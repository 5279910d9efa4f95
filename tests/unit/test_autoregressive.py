"""The autoregressive policy: windows that leak nothing, block-causal attention, the exact cache,
feedback."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZE, observations_of

from data import held_frames, waypoint_labels
from data_ar import NEAR, WindowDataset, following_frames, window_frames
from eval import draw_seed
from formats.dataset import open_dataset
from model_autoregressive import AutoregressiveConfig, AutoregressivePolicy
from nets import layers
from nets.history import padded_rows
from nets.layers import FrameBlock, Resolutions, dense_mask, flex_frame_attention, frame_attention
from rot_utils import rotvec_to_matrix
from runtime import UserError
from sim.rollout import PolicyAgent

SMALL = {
    "backbone": "efficientnet_lite0",
    "image_size": SIZE,
    "waypoint_stride": 4,
    "context": 5,
    "grid": 16,
    "n_height_bins": 8,
    "n_rot_bins": 8,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 2,
    "mlp_ratio": 2,
    "patch_grid": 4,
    "key_width": 8,
}
VARIANTS = {
    "pointer": {},
    "mlp": {"head": "mlp"},
    "current": {"anchor": "current"},
    "hires": {"recent_hires": 2},
    "coarse_to_fine": {"coarse_to_fine": True},
    "position": {"patch_position": True},
    "bare": {"temporal": False, "relative": False},
    "smooth": {"smooth_weight": 0.1},
    "rays": {"rays": True},
}


def config(**changes):
    return AutoregressiveConfig(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def windows(synthetic_demos, backbone, tmp_path_factory):
    """The windows of the synthetic demonstrations."""
    demos = open_dataset(synthetic_demos).demos
    return WindowDataset(
        demos,
        config(),
        backbone,
        cache=tmp_path_factory.mktemp("cache"),
        progress=False,
    )


def policy_of(windows, **changes):
    torch.manual_seed(0)
    policy = AutoregressivePolicy(config(**changes), windows.backbone.channels).attach(
        windows.backbone
    )
    policy.fit_statistics(windows.statistics())
    return policy.eval()


def full_windows(windows, n=4):
    """A batch of windows without padding."""
    full = [i for i, w in enumerate(windows.windows) if len(w) == SMALL["context"]]
    return windows.batch([full[i] for i in np.linspace(0, len(full) - 1, n).astype(int)])


# -- windows


def test_a_frame_shows_where_the_decision_before_led(windows):
    """In a window, image and EEF of frame t are (nearly) those at the waypoint of t-1, as in a
    closed loop.
    """
    for window in windows.windows:
        for a, b in zip(window[:-1], window[1:]):
            demo = windows.demos[windows.row_demo[a]]
            target = waypoint_labels(
                demo, SMALL["waypoint_stride"], 1, False, windows.config.min_travel
            )[0]
            assert (
                abs(
                    following_frames(demo, target[:, 0])[windows.row_frame[a]]
                    - windows.row_frame[b]
                )
                <= NEAR
            )
            assert not held_frames(demo)[windows.row_frame[b]]


def test_no_input_of_a_frame_holds_its_target(windows):
    """The EEF positions of frames up to t were recorded at or before frame t, and its target after
    it. Nothing leaks.
    """
    batch = windows.batch(np.arange(len(windows)))
    for b, window in enumerate(windows.windows):
        demo = windows.demos[windows.row_demo[window[0]]]
        frames = windows.row_frame[window]
        assert (np.diff(frames) > 0).all()
        for t, frame in enumerate(frames):
            np.testing.assert_array_equal(batch["eef_pos"][b, t], demo.ee_pos[frame])
            if batch["mask"][b, t]:
                later = np.flatnonzero((demo.ee_pos == batch["target_pos"][b, t].numpy()).all(1))
                assert later.max() >= frame


def test_targets_of_windows_are_those_of_their_frames(windows):
    """What is trained is the recording's next waypoint, command and rotation: not those of a frame
    before or after.
    """
    batch, c = windows.batch(np.arange(len(windows))), windows.config
    for b, window in enumerate(windows.windows):
        demo = windows.demos[windows.row_demo[window[0]]]
        target, command, *_ = waypoint_labels(demo, c.waypoint_stride, 1, False, c.min_travel)
        for t, frame in enumerate(windows.row_frame[window]):
            if batch["mask"][b, t]:
                want = target[frame, 0]
                np.testing.assert_array_equal(batch["target_pos"][b, t], demo.ee_pos[want])
                turned = rotvec_to_matrix(demo.ee_ori[want])
                np.testing.assert_allclose(batch["target_rot"][b, t], turned, atol=1e-6)
                assert batch["target_gripper"][b, t] == command[frame, 0]


def test_windows_are_padded_at_the_episodes_start(windows):
    """Short windows begin at the first decision; padding stands after them, is marked, and is never
    trained on."""
    batch = windows.batch(np.arange(len(windows)))
    lengths = np.array([len(w) for w in windows.windows])
    assert (lengths < SMALL["context"]).any() and (lengths == SMALL["context"]).any()
    assert (batch["valid"].sum(1).numpy() == lengths).all()
    assert not batch["mask"][~batch["valid"]].any()
    short = [w for w in windows.windows if len(w) < SMALL["context"]]
    assert all(windows.row_frame[w[0]] < SMALL["waypoint_stride"] + NEAR for w in short)


def test_every_usable_frame_ends_one_window(windows):
    """Metrics over the newest frames of windows cover the same frames as PARA's."""
    ends = [(windows.row_demo[w[-1]], windows.row_frame[w[-1]]) for w in windows.windows]
    assert len(set(ends)) == len(ends)
    assert sorted(ends) == [
        (d, i)
        for d, demo in enumerate(windows.demos)
        for i in np.flatnonzero(
            waypoint_labels(demo, SMALL["waypoint_stride"], 1, False, windows.config.min_travel)[3]
        )
    ]


def test_window_frames_follow_the_nearest_decision():
    """Windows are built backwards: before a frame comes the decision that led nearest to it, and
    none that missed it by more than NEAR.
    """
    following = np.minimum(np.arange(30) + 4, 29)
    assert window_frames(following, 20, 4, np.ones(30, bool)) == [8, 12, 16, 20]
    allowed = np.ones(30, bool)
    allowed[9:17] = False
    assert window_frames(following, 20, 4, allowed) == [17, 20]
    allowed[:20] = False
    assert window_frames(following, 20, 4, allowed) == [20]


# -- attention


@pytest.mark.parametrize(
    "resolutions", [Resolutions(), Resolutions(2, 5, 3)], ids=["plain", "two resolutions"]
)
@pytest.mark.parametrize("queries", [7, 3])
def test_frame_attention_equals_a_dense_mask(resolutions, queries):
    """Slices of the past, a dense mask and FlexAttention are the same function: outputs and
    gradients agree in double precision.
    """
    torch.manual_seed(0)
    B, T, N, h, e, context = 2, 7, 7, 2, 16, 4
    k, v = (torch.randn(B, T, N, h, e, dtype=torch.float64, requires_grad=True) for _ in "kv")
    q = torch.randn(B, queries, N, h, e, dtype=torch.float64, requires_grad=True)
    out = frame_attention(q, k, v, context, resolutions)
    flat = lambda x: x.flatten(1, 2).transpose(1, 2)
    mask = dense_mask(queries, N, T, N, context, resolutions)
    expected = (
        F.scaled_dot_product_attention(flat(q), flat(k), flat(v), attn_mask=mask)
        .transpose(1, 2)
        .unflatten(1, (queries, N))
    )
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(out)
    grads = [
        torch.autograd.grad((o * weight).sum(), (q, k, v), retain_graph=True)
        for o in (out, expected)
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    with torch.no_grad():
        single = [x.float() for x in (q, k, v)]
        torch.testing.assert_close(
            flex_frame_attention(*single, context, resolutions), out.float(), atol=1e-5, rtol=1e-5
        )


def test_two_resolutions_hide_what_they_should():
    """Recent frames are seen through their first tokens, older ones through their pooled tokens.

    Nothing of the future or beyond the context is seen.
    """
    mask = dense_mask(6, 1, 6, 5, 4, Resolutions(2, 4, 2)).view(6, 6, 5)
    assert mask[5, 5].tolist() == mask[5, 4].tolist() == [True] * 4 + [False]
    assert mask[5, 3].tolist() == mask[5, 2].tolist() == [False] * 2 + [True] * 3
    assert not mask[5, 1].any() and not mask[2, 3:].any()


def test_a_block_with_a_cache_equals_the_whole_window():
    """Frames one by one with cached keys and values give the result of all frames at once, also
    after frames left the context.
    """
    torch.manual_seed(0)
    block = FrameBlock(16, 2).double()
    x = torch.randn(2, 9, 4, 16, dtype=torch.float64)
    whole, _ = block(x, 3)
    past, parts = None, []
    for t in range(9):
        out, past = block(x[:, t : t + 1], 3, past=past)
        past = tuple(p[:, -2:] for p in past)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
    rows, _ = block(x, 3, rows=slice(1, 2))
    torch.testing.assert_close(rows, whole[:, :, 1:2], atol=1e-12, rtol=0)


# -- the policy


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_learn_and_use_every_parameter(name, windows):
    """Each flag's variant has a finite loss, a gradient for every parameter, and predictions of the
    right shape."""
    policy = policy_of(windows, **VARIANTS[name]).train()
    batch = full_windows(windows)
    policy.loss(batch)["loss"].backward()
    for key, p in policy.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, key
    assert policy.eval().predict(batch)["position"].shape == (*batch["mask"].shape, 3)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "current"])
def test_the_future_is_out_of_sight(name, windows):
    """Changing image, EEF or fingers of frame t+1 changes nothing up to frame t, and something
    after."""
    policy, batch = policy_of(windows, **VARIANTS[name]), full_windows(windows)
    out = policy.predict(batch)["position"]
    other = {
        **batch,
        "features": [f.clone() for f in batch["features"]],
        "eef_pos": batch["eef_pos"].clone(),
    }
    for f in other["features"]:
        f[:, 3:] = f[:, 3:].flip(0) + 1
    other["eef_pos"][:, 3:] += 0.05
    changed = policy.predict(other)["position"]
    torch.testing.assert_close(changed[:, :3], out[:, :3], atol=0, rtol=0)
    assert (changed[:, 3:] - out[:, 3:]).abs().max() > 1e-6


def test_padding_is_out_of_sight(windows):
    """What stands in padded frames never changes a real frame's prediction or the loss."""
    policy = policy_of(windows)
    batch = windows.batch([i for i, w in enumerate(windows.windows) if len(w) == 3][:2])
    other = {**batch, "features": [f.clone() for f in batch["features"]]}
    for f in other["features"]:
        f[:, 3:] = 7
    torch.testing.assert_close(
        policy.predict(other)["position"][:, :3],
        policy.predict(batch)["position"][:, :3],
        atol=0,
        rtol=0,
    )
    assert policy.loss(other)["loss"].item() == policy.loss(batch)["loss"].item()


@pytest.mark.parametrize(
    "changes",
    [{}, {"recent_hires": 2}, {"head": "mlp"}, {"rays": True}, {"anchor": "current"}],
    ids=str,
)
def test_acting_equals_the_full_window(changes, windows, synthetic_demos):
    """With measured positions and within the context, decisions with the cache equal those of the
    whole window.
    """
    policy = policy_of(windows, **changes)
    policy.without_reached = lambda logits, batch: (
        logits
    )  # the window's predictions keep all voxels
    index = next(
        i
        for i, w in enumerate(windows.windows)
        if len(w) == SMALL["context"] and windows.row_demo[w[0]] == 0
    )
    frames = windows.row_frame[windows.windows[index]]
    batch = windows.batch([index])
    acted = np.stack([policy.act(o).position for o in observations_of(windows.demos[0], frames)])
    # every frame is seen from the newest: only the last one's answer is the window's
    if changes.get("anchor") == "current":
        expected = policy.predict(batch)["position"][0, -1:]
        acted = acted[-1:]
    else:
        expected = policy.predict(batch)["position"][0]
    np.testing.assert_allclose(acted, expected.detach().numpy(), atol=1e-4)


def test_without_history_a_decision_stands_alone(windows):
    """Trained on windows of one frame, a policy has never seen where the decision before was."""
    policy = policy_of(windows, context=1)
    first, second = observations_of(windows.demos[0], windows.row_frame[[0, len(windows) // 8]])
    policy.act(first)
    after = policy.act(second).position
    policy.reset()
    policy.number = 1  # the same place in the episode
    np.testing.assert_array_equal(policy.act(second).position, after)


def test_where_the_eef_already_is_is_no_answer(windows, synthetic_demos):
    """In use, voxels nearer to the EEF than the labels' least distance are excluded, unless the
    gripper changes.
    """
    policy, batch = policy_of(windows), full_windows(windows, 2)
    frame = {k: batch[k][:, 0] for k in ("eef_pos", "gripper_width", "K", "E")}
    logits = torch.zeros(2, 2, *policy.volume_shape)
    fine = {
        **frame,
        "eef_pos": policy.points(
            torch.tensor([[4.0, 7.0, 8.0], [2.0, 3.0, 9.0]])[:, None].double(), frame
        )[:, 0],
    }
    left = torch.isfinite(policy.without_reached(logits, fine))
    command = (frame["gripper_width"] < 0.04).long()
    for i, (z, y, x) in enumerate([(4, 7, 8), (2, 3, 9)]):
        assert not left[i, command[i], z, y, x] and left[i, 1 - command[i]].all()
        assert left[i].float().mean() > 0.9
    staying = policy_of(windows, stay=True)  # of a task in which to stay is an answer
    assert torch.isfinite(staying.without_reached(logits, fine)).all()


def test_the_known_eef_is_the_one_that_feedback_names(windows, synthetic_demos):
    """--feedback measured: each decision gets the observed EEF; predicted: its own last waypoint;
    hybrid:N: the first up to N decisions, then the second.
    """
    policy = policy_of(windows)
    frames, seen = [0, 4, 8, 20, 24], []
    plain = policy.eef_coordinates
    policy.eef_coordinates = lambda batch: (
        seen.append(batch["eef_pos"][0, 0].numpy().copy()),
        plain(batch),
    )[1]
    recorded = windows.demos[0].ee_pos[frames]
    for feedback, n in (("measured", 5), ("predicted", 1), ("hybrid:3", 3)):
        policy.config.feedback = feedback
        policy.reset()
        seen.clear()
        answers = np.stack(
            [policy.act(o).position for o in observations_of(windows.demos[0], frames)]
        )
        np.testing.assert_allclose(seen[:n], recorded[:n])
        np.testing.assert_allclose(
            np.array(seen[n:]).reshape(-1, 3), answers[n - 1 : -1][: 5 - n], atol=1e-9
        )
    policy.config.feedback = "hybrid:x"
    with pytest.raises(UserError, match="hybrid:N"):
        policy.check()


def test_sampling_follows_the_distribution(windows, synthetic_demos):
    """--sample draws different waypoints, and at a low temperature the peak."""
    policy, batch = policy_of(windows, decode="argmax"), full_windows(windows, 2)
    peak = policy.predict(batch)["position"]
    policy.config.sample = True
    torch.manual_seed(1)
    assert not torch.allclose(policy.predict(batch)["position"], policy.predict(batch)["position"])
    policy.config.temperature = 1e-4
    torch.testing.assert_close(policy.predict(batch)["position"], peak)


def test_a_sampled_episode_does_not_depend_on_those_before(windows, synthetic_demos):
    """With --sample an episode's answers depend only on --seed and its own number.

    Earlier episodes of a worker and the global generator do not matter; another --seed draws other
    answers.
    """
    policy = policy_of(windows, sample=True, temperature=3.0)
    agent = PolicyAgent(policy)

    def episode(seed, number):
        agent.start(None, None, draw_seed(seed, number))
        return np.stack(
            [agent.act(o, 0).position for o in observations_of(windows.demos[0], [0, 4, 8])]
        )

    torch.manual_seed(0)
    alone = episode(0, 1)
    episode(0, 0)  # the worker's episodes in another order
    torch.manual_seed(5)
    np.testing.assert_array_equal(episode(0, 1), alone)
    for other in ((1, 1), (0, 2)):
        assert np.abs(episode(*other) - alone).max() > 1e-3


@pytest.mark.parametrize("trained_frames", [0, 1])
def test_smoothness_is_trained_whichever_frames_are_drawn(windows, trained_frames):
    """The smoothness penalty has a value and a gradient with all frames of a window and with one.

    Without its flag it is absent.
    """
    policy, batch = (
        policy_of(windows, smooth_weight=0.1, trained_frames=trained_frames).train(),
        full_windows(windows),
    )
    torch.manual_seed(0)
    parts = policy.loss(batch)
    assert parts["smoothness"] > 0.1 and "smoothness" not in policy_of(windows).train().loss(batch)
    logits = torch.zeros(1, 2, *policy.volume_shape)
    batch["mask"] = torch.zeros_like(batch["mask"]).index_fill(1, torch.tensor([2]), 1)
    rows = policy.supervised(batch)
    policy.smoothness(
        batch,
        logits.expand(len(rows), -1, -1, -1, -1),
        torch.zeros(len(batch["mask"]), dtype=torch.long),
        rows,
    ).backward()
    assert policy.pointer.linear.weight.grad.abs().max() > 0


def test_noise_is_for_training_alone(windows):
    """Training sees EEF positions displaced by the stated size, in most windows and frames.

    In use the measured ones count.
    """
    policy, batch = policy_of(windows), full_windows(windows)
    torch.testing.assert_close(
        policy.eef_coordinates(batch), policy.coordinates(batch["eef_pos"], batch).float()
    )
    policy.train()
    torch.manual_seed(0)
    offsets = torch.stack(
        [
            policy.eef_coordinates(batch) - policy.coordinates(batch["eef_pos"], batch).float()
            for _ in range(400)
        ]
    )
    px = offsets[..., 1:].std() * policy.config.image_size / policy.config.grid
    assert px == pytest.approx(14 * np.sqrt(0.7 * 1.25), rel=0.1)


def test_bad_settings_are_named():
    """A width that the heads do not divide is refused in one sentence."""
    with pytest.raises(UserError, match="--n_heads"):
        AutoregressivePolicy(config(dim=30, n_heads=4), [40, 112])
    assert dataclasses.asdict(config())["feedback"] == "measured"


# -- the way to compute attention


def test_attention_can_be_chosen(windows):
    """--attention sdpa and flex give the same policy.

    FlexAttention can be switched off, and on where it is not the default.
    """
    losses = []
    for way in ("auto", "sdpa", "flex"):
        torch.manual_seed(0)
        policy = policy_of(windows, attention=way, dim=32, n_heads=2)
        assert {block.attention for block in policy.blocks} == {way}
        with torch.no_grad():  # without a compiler it has no backward pass on a CPU
            losses.append(policy.loss(windows.batch([0, 5]))["loss"].item())
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)


def test_flex_attention_of_narrow_heads_is_refused(windows):
    """Heads too narrow for compiled FlexAttention are refused in one sentence where flex is asked
    for. Elsewhere they are no error.
    """
    with pytest.raises(UserError, match="--attention flex: heads are 4 wide .* needs 16; use sdpa"):
        policy_of(windows, attention="flex", dim=16, n_heads=4)
    policy_of(windows, attention="auto", dim=16, n_heads=4)


def test_more_shapes_than_torch_allows(monkeypatch):
    """Last batches and growing windows have other shapes.

    From the ninth shape on torch would compute dense scores without a warning.
    """
    compiled = []

    def backend(graph, _):
        compiled.append(1)
        return graph.forward

    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(
        layers,
        "compiled_flex",
        lambda: torch.compile(flex_attention, backend=backend, dynamic=False),
    )
    torch._dynamo.reset()
    call = layers.compiled_flex()
    monkeypatch.setattr(layers, "compiled_flex", lambda: call)
    for n in range(1, 11):
        q, k, v = (torch.randn(n, 2, 3, 1, 16) for _ in "qkv")
        layers.flex_frame_attention(q, k, v, 2, compile=True)
    assert len(compiled) == 10


def test_a_gpu_trains_as_many_frames_at_every_step():
    """On a GPU a fixed number of frames is trained: to count those that a mask leaves the CPU would
    have to wait. Windows that are too short are filled with masked frames.
    """
    mask = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]])
    rows = padded_rows(mask, 2)
    assert rows.tolist() == [0, 2, 4, 7, 8, 9]
    assert padded_rows(mask, 4).tolist() == list(range(12))
