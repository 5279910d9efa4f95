"""LIBERO's HDF5 files, written to the letter of its own scripts/create_dataset.py."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import h5py
import numpy as np

from rot_utils import matrix_to_rotvec
from sim.tasks import env_metadata

SIDE = 128  # px of LIBERO's images
ENV_KWARGS = {
    "robots": ["Panda"],
    "controller_configs": {"type": "OSC_POSE", "control_delta": True},
    "camera_names": ["robot0_eye_in_hand", "agentview"],
    "control_freq": 20,
    "camera_heights": SIDE,
    "camera_widths": SIDE,
}


def play(scene, actions):
    """Play actions (T,7) from the scene's state -> what create_dataset.py gathers: states are those
    before each action, observations those after it, images with their rows bottom first.
    """
    found = {"states": [], "actions": np.asarray(actions, dtype=float)}
    for action in actions:
        found["states"].append(scene.state())
        scene.step(action)
        seen = scene.observe(image=False)
        ori = matrix_to_rotvec(seen.eef_rot)
        rows = {
            "obs/gripper_states": seen.gripper_qpos,
            "obs/joint_states": seen.joint_pos,
            "obs/ee_states": np.concatenate([seen.eef_pos, ori]),
            "obs/ee_pos": seen.eef_pos,
            "obs/ee_ori": ori,
            "robot_states": np.concatenate([seen.gripper_qpos, seen.eef_pos, seen.eef_quat]),
        }
        for key, camera in (("agentview", "agentview"), ("eye_in_hand", "robot0_eye_in_hand")):
            draw = scene.sim.render(width=SIDE, height=SIDE, camera_name=camera)
            rows[f"obs/{key}_rgb"] = draw
        for key, value in rows.items():
            found.setdefault(key, []).append(value)
    last = np.zeros(len(actions), np.uint8)
    last[-1] = 1
    return {**{k: np.stack(v) for k, v in found.items()}, "dones": last, "rewards": last}


def model_xml(scene):
    """The scene's model as XML, its fixtures where they stand.

    LIBERO's script asks MuJoCo for it (mj_saveLastXML), which writes the poses of the compiled
    model into its last XML. Here a Scene compiles a tiny one afterwards, to free memory.
    """
    tree = ElementTree.fromstring(scene.env.env.model.get_xml())
    names = {scene.sim.model.body_id2name(i): n for n, i in scene.env.env.obj_body_id.items()}
    poses = scene.fixtures()
    for body in tree.iter("body"):
        if (name := names.get(body.get("name"))) in poses:
            body.set("pos", " ".join(f"{x:.6g}" for x in poses[name][:3]))
            body.set("quat", " ".join(f"{x:.6g}" for x in poses[name][3:]))
    return ElementTree.tostring(tree, encoding="unicode")


def write_official(path, scene, demos):
    """Write a file as LIBERO publishes them. demos: such dicts as `play` answers."""
    about = env_metadata(scene.task)
    # the path on its author's machine
    bddl = f"chiliocosm/{about['bddl_file_name']}"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = about["env_name"]
        data.attrs["problem_info"] = about["problem_info"]
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["bddl_file_name"] = bddl
        data.attrs["bddl_file_content"] = Path(scene.task.bddl).read_text()
        arguments = {"type": 1, "env_name": about["env_name"], "bddl_file": bddl}
        arguments |= {"problem_name": "libero_tabletop_manipulation", "env_kwargs": ENV_KWARGS}
        data.attrs["env_args"] = json.dumps(arguments)
        for i, demo in enumerate(demos):
            group = data.create_group(f"demo_{i}")
            for key, value in demo.items():
                group.create_dataset(key, data=value)
            group.attrs["num_samples"] = len(demo["actions"])
            group.attrs["model_file"] = model_xml(scene)
            group.attrs["init_state"] = demo["states"][0]
        data.attrs["num_demos"] = len(demos)
        data.attrs["total"] = sum(len(demo["actions"]) for demo in demos)
