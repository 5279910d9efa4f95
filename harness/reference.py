"""Frames of the training demonstrations that a checkpoint carries: eval.py renders their states and
compares, so that a flip cannot go unnoticed.
"""

import numpy as np
import torch


def protocol_references(demos):
    """A recorded frame of each scene among the demonstrations, as tensors by name.

    The first one's names are those of `protocol_reference`; of a second scene, as the recipe has
    it, they end in "_2". Of several tasks each name has its task behind an "@". {} for recordings
    of a real robot, which have no states to render.
    """
    tasks = dict.fromkeys(demo.group for demo in demos)
    # of the clean scene and of the full one the states have other lengths
    first = {task: {} for task in tasks}
    for demo in demos:
        if demo.states.size:
            first[demo.group].setdefault(demo.states.shape[1], demo)
    found = {}
    for task, scenes in first.items():
        for i, demo in enumerate(scenes.values(), 1):
            ending = f"_{i}" if i > 1 else ""
            ending += f"@{task}" if len(tasks) > 1 else ""
            found.update({k + ending: v for k, v in protocol_reference(demo).items()})
    return found


def protocol_reference(demo, side=56):
    """A recorded frame's state, camera and small image, as tensors by name. side: of the small
    image, pixels.
    """
    image = demo.images([0])[0]
    # means of blocks of n x n pixels, (side,side,3)
    n = len(image) // side
    blocks = image[: n * side, : n * side].reshape(side, n, side, n, 3)
    small = blocks.mean((1, 3))
    return {
        "protocol_state": torch.from_numpy(demo.states[0]),
        "protocol_extrinsics": torch.from_numpy(demo.E),
        "protocol_image": torch.from_numpy(small.round().astype(np.uint8)),
    }
