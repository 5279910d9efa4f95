"""Checks before an evaluation, for mistakes that let it run and make all its numbers wrong."""

import numpy as np

from camera import project, unproject
from formats.demos import GRIPPER_STEPS
from sim.libero_env import CLOSE, OPEN, OPEN_WIDTH
from sim.tasks import trained_elsewhere, unperturbed


def check_protocol(scene, reference, condition, moved=False):
    """Check what silently ruins evaluations -> dict of what was measured. Raises RuntimeError for
    the first check that fails.

    - The init states are distinct.
    - From the first episode's view, unprojecting projected points gives the points back, and an
      object's body is seen at its projected pixel: the image is the right way up.
    - A training frame's state, rendered by this code, looks like the image that was trained on. In
      a LIBERO-PRO suite too, as the state puts its objects back.
    - The fingers open and close as commanded.

    reference: arrays that a checkpoint carries, see `training_frame_difference`. condition: of the
    first episode, a settings.Condition. moved: fixtures stand elsewhere than where they were
    recorded, as in LIBERO-Plus's layouts.
    """
    found = {}
    # equal init states would count one episode several times
    states = scene.init_states()
    if len(np.unique(states, axis=0)) != len(states):
        raise RuntimeError("protocol: the benchmark's init states are not distinct")
    found["distinct_init_states"] = len(states)
    # camera: world points to pixels and back, (N,3), the EEF and the objects
    scene.begin_episode(states[0])
    scene.set_view(condition)
    o = scene.observe()
    points = np.stack([o.eef_pos, *[scene.position(n) for n in scene.objects]])
    u, v, _ = project(points, o.K, o.E)
    found["camera_round_trip_m"] = float(
        np.abs(unproject(u, v, points[:, 2], o.K, o.E) - points).max()
    )
    if found["camera_round_trip_m"] > 1e-9:
        raise RuntimeError(
            f"protocol: camera round trip is off by {found['camera_round_trip_m']} m"
        )
    # image orientation: which bodies are seen where the objects are projected to
    inside = [
        (n, a, b)
        for n, a, b in zip(scene.objects, u[1:], v[1:])
        if 0 < a < scene.image_size and 0 < b < scene.image_size
    ]
    seen = {n: str(scene.visible_body(a, b)) for n, a, b in inside}
    found["objects_seen_at_their_pixels"] = sorted(
        n for n, body in seen.items() if body.startswith(n)
    )
    # one is enough: others may be hidden behind something
    if not found["objects_seen_at_their_pixels"]:
        raise RuntimeError(
            f"protocol: image orientation, at the objects' projected pixels stand {seen}"
        )
    difference = training_frame_difference(scene, reference, moved)
    if difference is not None:
        found["training_frame_difference"] = difference
    # the gripper's sign, by the width between the fingers in m after each command
    scene.begin_episode(states[0])
    widths = []
    for command in (OPEN, CLOSE, OPEN):
        for _ in range(GRIPPER_STEPS + 2):
            scene.step([0, 0, 0, 0, 0, 0, command])
        widths.append(round(scene.observe(image=False).gripper_width, 4))
    found["finger_widths_open_close_open_m"] = widths
    if not (widths[0] > OPEN_WIDTH and widths[1] < 0.02 and widths[2] > OPEN_WIDTH):
        raise RuntimeError(
            f"protocol: the gripper's sign is wrong, widths after open, close, open are {widths} m"
        )
    return found


def references_of(task, info, reference):
    """A checkpoint's stored frames that show a Task's scene, for `training_frame_difference`.

    Those of the only task that was trained on name none. Another task may have other objects in a
    state (S,) of the same length, which would then look otherwise.
    info: of the checkpoint; reference: its arrays.
    """
    return {} if trained_elsewhere(info, task) else reference


def training_frame_difference(scene, reference, moved=False):
    """Render a training frame's state again -> the mean difference to the stored image in grey
    levels (0-255), or None where no stored frame is of this scene.

    reference: arrays that a checkpoint carries, see harness/reference.py: "protocol_state" (S,),
    "protocol_extrinsics" (4,4) and "protocol_image" (s,s,3), and with the ending "_2" those of a
    second scene, with "@TASK" those of a task; {} for none. Raises RuntimeError where the image
    fits better turned or mirrored, or differs: not so with `moved` fixtures, which no state holds.
    """
    width, task = len(scene.state()), unperturbed(scene.task).key
    endings = [
        e
        for e in ("", "_2", f"@{task}", f"_2@{task}")
        if len(reference.get(f"protocol_state{e}", ())) == width
    ]
    if not endings:
        return None
    state, E, stored = (
        reference.get(f"protocol_{name}{endings[0]}") for name in ("state", "extrinsics", "image")
    )
    scene.set_state(state)
    scene.set_camera(E)
    stored, image = stored.astype(float), scene.render().astype(float)
    side = len(stored)
    k = len(image) // side
    # averaged over k x k pixels to the stored image's size (s,s,3)
    small = image[: side * k, : side * k].reshape(side, k, side, k, 3).mean((1, 3))
    # also of the ways in which an image may be wrong
    errors = {
        name: float(np.abs(view - stored).mean())
        for name, view in (
            ("as it is", small),
            ("upside down", small[::-1]),
            ("mirrored", small[:, ::-1]),
            ("turned by 180 deg", small[::-1, ::-1]),
        )
    }
    best = min(errors, key=errors.get)
    if best != "as it is" or (errors[best] > 12 and not moved):
        raise RuntimeError(
            f"protocol: a training frame renders differently here, it fits best {best}: {errors}"
        )
    return errors["as it is"]
