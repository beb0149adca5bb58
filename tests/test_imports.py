"""Who may import whom, read from the source; what importing the package loads."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "topk_jax"

# Room -> rooms of ours that it may import, wherever in a file the import stands.
_TABLES = {"decisions", "trials", "files"}
_DATA = _TABLES | {"images", "download", "stimuli"}
_TOPK = {"topk", "kernels", "selection", "telemetry"}
_NETWORKS = _TOPK | {"convolution", "layers", "networks", "weights"}
_RUNS = {"evaluation", "training", "parallel", "metrics"}
ALLOWED = {
    "kernels": set(),
    "metrics": set(),
    "files": set(),
    "parallel": set(),
    "selection": {"kernels"},
    "topk": {"kernels", "selection"},
    "telemetry": {"kernels", "topk"},
    "convolution": set(),
    "layers": {"topk", "convolution"},
    "trials": {"files"},
    "decisions": {"trials", "files"},
    "download": {"files"},
    "images": {"files"},
    "stimuli": _DATA,
    "networks": {"topk", "layers"},
    "weights": _NETWORKS | {"images", "download", "files"},
    "evaluation": _DATA | _NETWORKS | {"parallel", "metrics"},
    "training": _DATA | _NETWORKS | _RUNS,
    "synthesis": _DATA | _NETWORKS | {"parallel"},
    "figures": _TABLES | {"metrics"},
    "jobs": _DATA | _NETWORKS | _RUNS | {"synthesis", "figures"},
    "cli": {"download"},
    "__init__": _DATA | _NETWORKS | _RUNS | {"synthesis"},
}


def room_of(path: pathlib.Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms(path):
    room = room_of(path)
    assert room in ALLOWED, f"room {room} has no entry in ALLOWED"
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top not in ("scripts", "configs", "tests"), f"{path} imports {name}"
        if top == "topk_jax":
            target = rest.partition(".")[0]
            assert target in ALLOWED[room] | {room}, f"{room} may not import {target} ({name})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(path):
    room, tops = room_of(path), {name.partition(".")[0] for name in imported(path)}
    assert not tops & {"tensorflow", "torch"} or path.parent.name == "jobs"
    assert room == "figures" or "matplotlib" not in tops
    assert room != "metrics" or not tops & {"jax", "flax", "PIL"}
    if room in ("figures", "decisions", "trials", "images", "files"):
        assert not tops & {"jax", "flax"}
    if room not in ("cli",):
        assert not any(name.startswith("absl.flags") or name == "absl.flags"
                       for name in imported(path))  # fmt: skip


def test_importing_the_package_is_light():
    program = (
        "import sys, topk_jax;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'orbax', 'pooch', 'grain',"
        " 'torch'} & set(sys.modules);"
        "import jax; from jax._src import xla_bridge;"
        "print(sorted(heavy), xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] False"
