"""The import rules: project/ imports nothing of ours, alacarte/ neither project/ nor steps/, a layer only lower layers."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# From bottom to top. A module may import modules of its own layer, and of the layers below it.
LAYERS = [
    ["errors", "folders", "locks", "verdicts"],
    [
        "formats",
        "data",
        "features",
        "feedback",
        "arguments",
        "source",
        "stores",
        "help",
        "own_code",
        "registry",
        "signals",
        "template",
    ],
    ["learners", "evaluation", "tracking"],
    ["launch", "processes", "retraining", "monitoring", "scoring", "serving"],
    ["databricks", "__main__"],
]
FORBIDDEN = {  # package -> modules that it must not import
    "alacarte.serving": ("hydra", "omegaconf", "alacarte.learners", "alacarte.launch", "alacarte.arguments"),
    "alacarte.feedback": ("alacarte.",),
    "alacarte": ("project", "steps", "examples"),
    "project": ("alacarte", "steps", "examples"),
    "steps": ("steps",),
}
ALLOWED = {"alacarte.feedback": ("alacarte.feedback", "alacarte.errors")}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, and `module.name` for each name imported from one; also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def modules(*packages: str) -> dict[str, set[str]]:
    """Module -> its imports."""
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): imports(path)
        for path in paths
    }


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package.rstrip('.')}.") for package in packages)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_does_not_import_what_is_not_for_it(package: str):
    for module, names in modules(*package.split(".")[:1]).items():
        if is_in(module, (package,)):
            allowed = ALLOWED.get(package, ())
            wrong = {name for name in names if is_in(name, FORBIDDEN[package]) and not is_in(name, allowed)}
            assert not wrong, f"{module} imports {sorted(wrong)}"


def test_a_module_imports_only_its_own_layer_and_lower_ones():
    layer_of = {f"alacarte.{name}": number for number, layer in enumerate(LAYERS) for name in layer}
    for module, names in modules("alacarte").items():
        if module == "alacarte":
            continue
        package = ".".join(module.split(".")[:2])
        assert package in layer_of, f"{package} has no layer: add it to LAYERS"
        used = {".".join(name.split(".")[:2]) for name in names if name.startswith("alacarte.")}
        higher = {name for name in used if layer_of.get(name, 0) > layer_of[package]}
        assert not higher, f"{module} imports {sorted(higher)}"


def test_no_import_cycle():
    ours = modules("alacarte", "project")
    graph = {name: {module for module in names if module in ours and module != name} for name, names in ours.items()}
    for name in graph:  # a package is imported with each of its modules; only its own imports count
        graph[name] -= {package for package in graph[name] if name.startswith(f"{package}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        pytest.fail(" imports ".join(cycle.args[1]))


def test_only_launch_and_its_arguments_know_hydra():
    using = {name for name, names in modules("alacarte").items() if any(is_in(module, ("hydra",)) for module in names)}
    assert using == {"alacarte.launch", "alacarte.arguments"}


def test_no_file_is_long():
    limits = {"steps": 100, "alacarte": 350, "project": 350}
    for package, limit in limits.items():
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= limit, path.relative_to(ROOT)
