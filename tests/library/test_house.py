"""The floors: project/ below, alacarte/ above it, steps/ on top; no arrow upwards, none in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def modules(folder: str) -> dict[str, set[str]]:
    return {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): imports(path)
        for path in (ROOT / folder).rglob("*.py")
    }


def test_no_arrow_upwards():
    for name, found in modules("project").items():
        assert not [module for module in found if module.split(".")[0] in ("alacarte", "steps")], name
    for name, found in modules("alacarte").items():
        assert not [module for module in found if module.split(".")[0] == "steps"], name
    for name, found in modules("steps").items():
        assert not [module for module in found if module.split(".")[0] == "steps"], f"{name} imports a step"


def test_no_circle():
    rooms = modules("alacarte") | modules("project")
    inside = {name: {module for module in found if module in rooms and module != name} for name, found in rooms.items()}
    for name in inside:  # a package is imported with each of its modules; what it imports itself is what counts
        inside[name] -= {package for package in inside[name] if name.startswith(f"{package}.")}
    TopologicalSorter(inside).prepare()


def test_only_launch_and_its_arguments_know_hydra():
    knowing = {name for name, found in modules("alacarte").items() if any(m.split(".")[0] == "hydra" for m in found)}
    assert knowing == {"alacarte.launch", "alacarte.arguments"}


def test_no_step_is_long():
    for path in (ROOT / "steps").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path.name
