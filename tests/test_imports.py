"""The import graph.

Arrows point one way, rooms keep to themselves, and `import vispco` stays light.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vispco

ROOT = Path(vispco.__file__).parent

#: Rooms, floor by floor: imports go to the same floor or further down. A new module needs a floor.
FLOORS = [
    {"registry", "utils"},
    {"config"},
    {
        "kernels",
        "relaxation",
        "ste",
        "dimensions",
        "flops",
        "alm",
        "pareto",
        "schedule",
        "budget",
        "visual_tokens",
        "frontier",
    },
    {"reading"},
    {"pruning"},
    {"methods", "models"},
    {"calibration"},
    {"latency", "evaluate", "profiling"},
    {"solvers"},
    {"search"},
    {"baselines"},
    {"plot", "testbed", "data"},
    {"integrations"},
    {"commands"},
    {"__main__"},
]
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
MAY_USE_TRANSFORMERS = {"models", "reading", "testbed", "commands", "data", "integrations"}
MAY_USE_MORE = {
    "plot",
    "testbed",
    "commands",
    "data",
    "utils",
    "baselines",
    "integrations",
}  # optional packages, see also the lazy ones below


def files():
    """{dotted name: syntax tree} of every module."""
    paths = {p: p.relative_to(ROOT).with_suffix("").parts for p in ROOT.rglob("*.py")}
    return {
        ".".join(parts): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path, parts in paths.items()
    }


MODULES = files()


def imports(name, lazy=True):
    """Absolute names that a module imports; `lazy=False`: at its top level only."""
    package = ["vispco", *name.split(".")[:-1]]
    tree = MODULES[name]
    for node in ast.walk(tree) if lazy else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(name):
    """The room of a module: its first part."""
    return name.split(".")[0]


def inside(name, **kwargs):
    """Modules of vispco that a module imports, as dotted names."""
    for target in imports(name, **kwargs):
        parts = target.split(".")
        if parts[0] == "vispco" and len(parts) > 1:
            options = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            yield next(
                (o for o in options if o in MODULES or f"{o}.__init__" in MODULES), "__init__"
            )


def outside(name, **kwargs):
    """Top-level packages other than vispco and the standard library."""
    return {t.split(".")[0] for t in imports(name, **kwargs)} - {"vispco", *sys.stdlib_module_names}


def test_the_reader_sees_imports():
    """The oracle itself: relative, absolute and lazy imports are all found."""
    assert {"registry", "utils.files"} <= set(inside("config")) and "flops" in set(
        inside("models.costs")
    )
    assert "transformers" in outside("pruning._cache") and "torch" in outside("alm")
    assert {m for m in inside("methods.fastv")} == {"registry", "methods.base", "methods.shared"}


def test_every_module_has_a_floor():
    homeless = {room(name) for name in MODULES} - set(FLOOR) - {"__init__"}
    assert not homeless, f"give {sorted(homeless)} a floor in tests/test_imports.py"


def test_every_room_is_on_the_reading_list():
    page = (ROOT.parent / "docs" / "reading-the-code.md").read_text(encoding="utf-8")
    rooms = {room(name) for name in MODULES} - {"__init__", "__main__"}
    missing = [
        r
        for r in rooms
        if f"`{r}.py`" not in page and f"`{r}/`" not in page and f"`{r}/base.py`" not in page
    ]
    assert not missing, f"docs/reading-the-code.md does not say what {sorted(missing)} is for"


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__init__"}))
def test_arrows_point_down(name):
    targets = {room(t) for t in inside(name)} - {room(name)}
    up = {t for t in targets if t != "__init__" and FLOOR[t] > FLOOR[room(name)]}
    assert not up, f"{name} imports {sorted(up)} from a higher floor"
    assert "__init__" not in targets or FLOOR[room(name)] >= FLOOR["plot"], (
        f"{name} imports the whole package"
    )


def test_no_circles():
    """Between modules, lazy imports included."""
    graph = {
        name: set(inside(name)) & set(MODULES) - {name}
        for name in MODULES
        if not name.endswith("__init__")
    }
    # Raises CycleError with the circle.
    TopologicalSorter(graph).prepare()


def test_methods_and_models_never_meet():
    for name in MODULES:
        if room(name) in ("methods", "models"):
            other = {"methods": "models", "models": "methods"}[room(name)]
            assert other not in {room(t) for t in inside(name)}, name


def test_a_plug_in_imports_no_core_but_its_base():
    """A method is given what it needs: context, registry, base.

    Plug-ins from elsewhere can do what ours do.
    """
    for name in MODULES:
        if room(name) == "methods" and not name.endswith("__init__"):
            assert {room(t) for t in inside(name)} <= {
                "methods",
                "registry",
                "pruning",
                "flops",
                "relaxation",
            }, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_third_parties(name):
    used = outside(name)
    # A KV cache is one of theirs.
    if room(name) not in MAY_USE_TRANSFORMERS and name != "pruning._cache":
        assert "transformers" not in used
    if room(name) not in MAY_USE_MORE:
        assert used <= {"torch", "numpy", "transformers"}
    if FLOOR.get(room(name), 9) <= 2:
        # tqdm comes with transformers, and only shows what is done.
        assert used <= {"torch", "numpy"} | ({"tqdm"} if name == "utils.progress" else set())


def test_optional_packages_are_imported_where_they_are_used():
    """Never at the top of a module.

    Without the extra, everything else must work. Only lmms-eval and vLLM import their plug-ins.
    """
    plugins = {"integrations.lmms_eval", "integrations.vllm.checks", "integrations.vllm.models"}
    for name in set(MODULES) - plugins:
        assert outside(name, lazy=False) <= {"torch", "numpy", "transformers", "safetensors"}, name


def test_no_asserts_for_users():
    """`python -O` removes them: users are told by ValueError."""
    asserting = [
        name
        for name, tree in MODULES.items()
        if any(isinstance(n, ast.Assert) for n in ast.walk(tree))
    ]
    assert not asserting


def test_importing_vispco_is_light():
    code = (
        "import sys, vispco; print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'matplotlib', 'sklearn', 'easy_vqa', 'PIL', 'pandas', 'scipy', 'optuna', "
        "'torchvision'}), 'vispco.testbed' in sys.modules, 'vispco.commands.main' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # transformers may bring PIL along.
    assert done.stdout.split("]")[0] + "]" in ("[]", "['PIL']"), done.stdout
    assert done.stdout.endswith("False False\n")


def test_the_public_names():
    """What the README uses is there; and `import *` of the package needs no private name."""
    for name in (
        "apply",
        "search",
        "count_flops",
        "evaluate",
        "PruningConfig",
        "Method",
        "Adapter",
        "Kernel",
        "register_method",
        "register_adapter",
        "register_kernel",
        "list_methods",
        "list_adapters",
        "list_kernels",
        "__version__",
    ):
        assert hasattr(vispco, name), name
