"""The import layers: each file imports only from below, and a laptop needs neither torch nor the
simulator."""

import ast
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# Files and packages, from the ground up. "model" stands for model.py and every model_*.py, "data"
# likewise.
LAYERS = [
    {"flags", "runtime", "rot_utils", "camera", "canonical", "waypoint"},
    {"policy"},
    {"formats", "nets"},
    {"model", "data"},
    {"registry"},
    {"harness"},
    {"sim"},
    {"figures"},
    {"study"},
    {
        *("collect_demos", "convert_demos", "train", "eval", "precompute_rotation_pca"),
        *("run_matrix", "compare", "deploy_dino_kv", "serve"),
    },
]
# What a file may import from its own package.
BESIDE = {
    "nets.backbone": {"nets.fusion"},
    "nets.feature_cache": {"nets.backbone"},
    "nets.fusion": {"nets.convolution"},
    "nets.history": {"nets.text", "nets.volume"},
    "nets.layers_voxel": {"nets.layers_voxel_triton", "nets.maps"},
    "nets.volume": {"nets.cross_entropy", "nets.text"},
    "formats.checks": {"formats.demos"},
    "formats.dataset": {
        "formats.interface",
        "formats.lerobot",
        "formats.libero_hdf5",
        "formats.smith300",
    },
    "formats.demos": {"formats.libero_cameras"},
    "formats.interface": {"formats.checks"},
    "formats.lerobot": {
        "formats.checks",
        "formats.demos",
        "formats.interface",
        "formats.lerobot_images",
        "formats.lerobot_tables",
        "formats.libero_cameras",
        "formats.pictures",
        "formats.smith300",
    },
    "formats.lerobot_images": {
        "formats.lerobot_tables",
        "formats.lerobot_video",
        "formats.smith300",
    },
    "formats.lerobot_writer": {
        "formats.demos",
        "formats.hdf5",
        "formats.lerobot",
        "formats.lerobot_statistics",
        "formats.lerobot_video",
        "formats.libero_hdf5",
        "formats.pictures",
    },
    "formats.libero_hdf5": {
        "formats.checks",
        "formats.demos",
        "formats.hdf5",
        "formats.interface",
    },
    "formats.mixture": {"formats.dataset", "formats.lerobot", "formats.smith300"},
    "formats.parts": {
        "formats.demos",
        "formats.hdf5",
        "formats.lerobot",
        "formats.libero_hdf5",
        "formats.smith300",
    },
    "formats.smith300": {"formats.checks", "formats.demos", "formats.interface"},
    "sim.asked": {
        "sim.layouts",
        "sim.remote",
        "sim.settings",
        "sim.simulator",
        "sim.tasks",
        "sim.variants",
    },
    "sim.cameras": {"sim.moved_cameras", "sim.settings"},
    "sim.check_setup": {"sim.renderer", "sim.simulator"},
    "sim.collected": {
        "sim.expert",
        "sim.instructions",
        "sim.recipe",
        "sim.settings",
        "sim.tasks",
    },
    "sim.expert": {"sim.libero_env", "sim.object_facts", "sim.planned_expert", "sim.tasks"},
    "sim.grasps": {"sim.clearance", "sim.object_facts"},
    "sim.instructions": {"sim.simulator", "sim.tasks"},
    "sim.keyposes": {"sim.grasps"},
    "sim.libero_env": {
        "sim.cameras",
        "sim.kept_model",
        "sim.physics",
        "sim.placement",
        "sim.simulator",
        "sim.tasks",
    },
    "sim.manoeuvres": {
        "sim.clearance",
        "sim.grasps",
        "sim.keyposes",
        "sim.libero_env",
        "sim.object_facts",
    },
    "sim.pick_place": {"sim.clearance", "sim.grasps", "sim.keyposes", "sim.libero_env"},
    "sim.plus": {"sim.moved_cameras", "sim.settings", "sim.tasks"},
    "sim.planned_expert": {
        "sim.libero_env",
        "sim.manoeuvres",
        "sim.object_facts",
        "sim.pick_place",
        "sim.tasks",
    },
    "sim.picture_proof": {"sim.libero_env", "sim.simulator"},
    "sim.protocol": {"sim.libero_env", "sim.tasks"},
    "sim.events": {"sim.expert", "sim.settings"},
    "sim.layouts": {
        "sim.events",
        "sim.instructions",
        "sim.moved_cameras",
        "sim.placement",
        "sim.settings",
        "sim.verdict",
    },
    "sim.moved_cameras": {"sim.settings"},
    "sim.decisions": {"sim.workers"},
    "sim.recipe": {"sim.settings"},
    "sim.mistakes": {
        "sim.clearance",
        "sim.expert",
        "sim.libero_env",
        "sim.pick_place",
        "sim.planned_expert",
    },
    "sim.recording": {
        "sim.expert",
        "sim.instructions",
        "sim.libero_env",
        "sim.mistakes",
        "sim.moved_cameras",
        "sim.recipe",
        "sim.settings",
        "sim.tasks",
        "sim.variants",
    },
    "sim.remote": {"sim.rollout"},
    "sim.replay": {
        "sim.instructions",
        "sim.moved_cameras",
        "sim.recording",
        "sim.settings",
        "sim.simulator",
        "sim.tasks",
    },
    "sim.rollout": {
        "sim.expert",
        "sim.handling",
        "sim.libero_env",
        "sim.placement",
        "sim.servo",
        "sim.tasks",
        "sim.variants",
    },
    "sim.servo": {"sim.expert", "sim.libero_env"},
    "sim.simulator": {"sim.kept_model", "sim.renderer"},
    "sim.tasks": {"sim.simulator"},
    "sim.verdict": {"sim.recipe", "sim.settings"},
    "sim.variants": {"sim.expert", "sim.libero_env"},
    "harness.finetune": {"harness.checkpoint"},
    "harness.trainer": {
        "harness.checkpoint",
        "harness.finetune",
        "harness.records",
        "harness.run_folder",
        "harness.validation",
    },
    "harness.run_folder": {"harness.records"},
    "harness.outcomes": {"harness.metrics"},
    "harness.sessions": {"harness.checkpoint"},
    "harness.summary": {"harness.metrics", "harness.records", "harness.statistics"},
    "harness.validation": {"harness.metrics"},
    "figures.heldout": {"figures.plots"},
    "figures.plots_rates": {"figures.plots"},
    "figures.plots_recipe": {"figures.plots"},
    "figures.plots_rotation": {"figures.plots"},
    "figures.plots_settings": {"figures.plots"},
    "figures.report": {"figures.pages", "figures.plots"},
    "study.bench": {
        "study.bench_attention",
        "study.bench_memory",
        "study.bench_rollout",
        "study.bench_train",
        "study.timing",
    },
    "study.bench_attention": {"study.timing"},
    "study.matrix_plan": {"study.graph", "study.matrix"},
    "study.matrix_table": {"study.matrix"},
    "study.bench_gpu": {"study.bench_attention"},
}
SIMULATOR = {"robosuite", "libero"}
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FILES = {
    path.relative_to(ROOT)
    .with_suffix("")
    .as_posix()
    .replace("/", ".")
    .removesuffix(".__init__"): path
    for path in [
        *sorted(ROOT.glob("*.py")),
        *(f for p in PACKAGES for f in sorted((ROOT / p).glob("*.py"))),
    ]
}
NAMES = set(FILES)


def family(name):
    """'model' for model.py and model_*.py, 'data' for data.py and data_*.py, else None."""
    return next((f for f in ("model", "data") if name == f or name.startswith(f"{f}_")), None)


def layer(name):
    """The layer of a file; None for a file that the table does not list."""
    part = family(name) or name.partition(".")[0]
    return next((i for i, names in enumerate(LAYERS) if part in names), None)


def imports(path):
    """Dotted names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # from PACKAGE import MODULE
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
            found |= inside or {node.module}
    return found


IMPORTS = {name: imports(path) for name, path in FILES.items()}
LOCAL = {name: found & NAMES for name, found in IMPORTS.items()}
SCRIPTS = {name for name, path in FILES.items() if '__name__ == "__main__"' in path.read_text()}


def reachable(name):
    """All files of the repository that an import of `name` brings in."""
    seen, todo = set(), [name]
    while todo:
        new = LOCAL[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_point_downwards(name):
    """A file imports only from lower layers, or from a file beside it that the table names."""
    assert layer(name) is not None, f"{name} is in no layer: add it to LAYERS"
    for other in LOCAL[name]:
        beside = (
            other in BESIDE.get(name, ())
            or layer(name) == 0
            or (family(name) and family(name) == family(other))
        )
        assert layer(other) < layer(name) or (layer(other) == layer(name) and beside), (
            f"{name} imports {other}"
        )


def test_imports_have_no_cycle():
    """No file imports itself, directly or through others."""
    # raises CycleError where there is one
    assert set(TopologicalSorter(LOCAL).static_order()) == NAMES


def test_models_never_import_data():
    """A model runs on a robot without demonstrations, so nothing that it imports reads them."""
    for name in filter(lambda n: family(n) == "model", NAMES):
        assert not {n for n in reachable(name) if family(n) == "data" or n.startswith("formats")}, (
            name
        )


def test_nothing_imports_a_script():
    """Scripts are run and never imported."""
    assert LAYERS[-1] <= SCRIPTS
    assert not {(name, other) for name, found in LOCAL.items() for other in found & SCRIPTS}


def test_two_files_know_the_simulator():
    """Only these files import robosuite or LIBERO, so only they have to follow changes there."""
    assert {
        name for name, found in IMPORTS.items() if {n.partition(".")[0] for n in found} & SIMULATOR
    } == {"sim.physics", "sim.simulator"}


@pytest.mark.parametrize(
    "names, absent",
    [
        (["rot_utils", "camera"], ["torch", "h5py"]),
        (["sim.libero_env", "sim.tasks"], ["robosuite", "libero", "mujoco", "torch"]),
        (["sim.workers", "formats.dataset", "collect_demos"], ["torch", "timm"]),
        (["eval", "sim.decisions", "sim.rollout"], ["torch", "timm", "robosuite", "libero"]),
        (["registry", "harness.checkpoint"], ["robosuite", "libero", "mujoco"]),
    ],
)
def test_light_imports_stay_light(names, absent):
    """A fresh interpreter that imports these modules has not loaded those heavy ones.

    So a laptop or a spawned worker starts quickly.
    """
    code = (
        f"import sys\nimport {', '.join(names)}\nprint(*[m for m in {absent} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_a_file_is_read_in_one_go(path):
    """A file has at most 600 lines, so that it can be read in one go."""
    assert len(path.read_text().splitlines()) <= 600


def test_no_file_is_a_drawer_of_helpers():
    """No file is called utils, helpers, common or misc: every helper has a place by its subject."""
    assert not {"utils", "helpers", "common", "misc"} & {
        part for name in NAMES for part in name.split(".")
    }


def test_the_root_is_read_in_a_minute():
    """The root holds what users type, the policies, and what everything is built on.

    The rest lies in packages.
    """
    assert len(list(ROOT.glob("*.py"))) <= 27


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_holds(package):
    """A package's __init__ is one sentence and no code, so importing one of its files imports
    only that file.
    """
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert len(body) == 1 and ast.get_docstring(ast.Module(body, [])).endswith(".")


def lint(folder):
    """Run import-linter over the packages in a folder."""
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_the_import_contract_holds():
    """`lint-imports` agrees, also over chains of imports, with the layers that pyproject.toml
    declares.
    """
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "file, line",
    [
        ("nets/volume.py", "from sim import rollout"),
        ("harness/metrics.py", "import train"),
        ("formats/demos.py", "import data"),
        ("sim/rollout.py", "import robosuite"),
    ],
)
def test_the_import_contract_sees_an_upward_import(file, line, tmp_path):
    """The contract fails for an upward import.

    One that names only packages that are gone would never fail.
    """
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / file, "a") as source:
        source.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr
