"""The import layers: each file imports only from below, and a laptop needs neither torch nor the simulator."""
import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from conftest import ROOT

LAYERS = [
    {"rot_utils", "camera", "layers", "layers_voxel", "layers_voxel_triton", "metrics", "runtime", "flags", "timing", "workers", "settings", "plots",
     "plots_rotation", "plots_settings", "graph", "pages", "fusion", "renderer", "hdf5", "records"},
    {"backbone", "demos", "smith300", "policy", "volume", "history", "matrix_table"},
    {"libero_env", "expert", "variants", "rollout"},  # and every model* and data*
    {"registry", "checkpoint", "finetune", "validation", "bench_attention", "survey", "trainer", "protocol", "parts"},
    {"collect_demos", "train", "eval", "report", "bench", "bench_gpu", "precompute_rotation_pca", "run_matrix", "deploy_dino_kv", "compare_rotation",
     "check_setup", "premise", "openloop", "diagnose"},
]
SCRIPTS = LAYERS[4]
BESIDE = {"volume": {"policy"}, "history": {"policy", "volume"}, "expert": {"libero_env"}, "variants": {"expert", "libero_env"}, "rollout": {"variants", "expert", "libero_env"}, "checkpoint": {"registry"}, "finetune": {"checkpoint"}, "trainer": {"checkpoint", "finetune", "validation"}, "smith300": {"demos"}, "bench_attention": {"registry"}}  # same layer
LONG = {"libero_env"}  # may exceed 400 lines: all that touches the simulator is in one file
SIMULATOR = {"robosuite", "libero"}
FILES = sorted(ROOT.glob("*.py"))
NAMES = {p.stem for p in FILES}


def family(name):
    """'model' for model.py and model_*.py, 'data' for data.py and data_*.py, else None."""
    return next((f for f in ("model", "data") if name == f or name.startswith(f"{f}_")), None)


def layer(name):
    """The layer of a file; None for one that the table does not know."""
    return 2 if family(name) else next((i for i, names in enumerate(LAYERS) if name in names), None)


def imports(path):
    """Top-level names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


IMPORTS = {p.stem: imports(p) for p in FILES}
LOCAL = {name: found & NAMES for name, found in IMPORTS.items()}


def reachable(name):
    """All files of the repository that importing `name` brings in."""
    seen, todo = set(), [name]
    while todo:
        new = LOCAL[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_point_downwards(name):
    """A file imports from lower layers only, or from the parent beside it that the table names."""
    assert layer(name) is not None, f"{name}.py is in no layer: add it to LAYERS"
    for other in LOCAL[name]:
        beside = other in BESIDE.get(name, ()) or layer(name) == 0 or (family(name) and family(name) == family(other))
        assert layer(other) < layer(name) or (layer(other) == layer(name) and beside), f"{name}.py imports {other}"


def test_imports_have_no_cycle():
    """No file imports itself through others."""
    assert set(TopologicalSorter(LOCAL).static_order()) == NAMES  # raises CycleError where there is one


def test_models_never_import_data():
    """A model runs on a robot without demonstrations: nothing that it imports reads them."""
    for name in filter(lambda n: family(n) == "model", NAMES):
        assert not {n for n in reachable(name) if family(n) == "data" or n == "demos"}, name


def test_nothing_imports_a_script():
    """Scripts are entered, not imported."""
    assert not {(name, found & SCRIPTS) for name, found in LOCAL.items() if found & SCRIPTS}


def test_one_file_knows_the_simulator():
    """Only libero_env.py imports robosuite or LIBERO, so that one file has to follow them."""
    assert {name for name, found in IMPORTS.items() if found & SIMULATOR} == {"libero_env"}


@pytest.mark.parametrize("names, absent", [
    (["rot_utils", "camera"], ["torch", "h5py"]),
    (["libero_env"], ["robosuite", "libero", "mujoco", "torch"]),
    (["workers", "demos", "smith300", "collect_demos"], ["torch", "timm"]),
    (["registry", "checkpoint"], ["robosuite", "libero", "mujoco"]),
])
def test_light_imports_stay_light(names, absent):
    """A fresh interpreter that imports these has not loaded those: a laptop or a spawned worker starts in no time."""
    code = f"import sys\nimport {', '.join(names)}\nprint(*[m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_files_are_short(path):
    """A file can be read in one go: 400 lines at most."""
    lines = path.read_text().splitlines()
    assert len(lines) <= 400 or path.stem in LONG


def test_there_is_no_utils_file():
    """Every helper lives where it belongs by name."""
    assert not {"utils", "helpers", "common", "misc"} & NAMES
