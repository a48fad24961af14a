"""alacarte: run an entry point in any folder.

    alacarte                    the entry points
    alacarte train seed=7       the same as `python -m steps.train seed=7`
    alacarte --version

The folder's own `steps/`, `conf/` and `project/` are used. If one of them does not exist, the library's own is used.
"""

import importlib.util
import os
import re
import runpy
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import alacarte
from alacarte.errors import nearest
from alacarte.folders import TEMPLATE

PACKAGES = ("steps", "examples.demo")  # that hold entry points
EXTRAS = {"serve": "serve", "promote": "", "score": ""}  # that an entry point needs; any other needs `train`


def main() -> int:
    name, *arguments = sys.argv[1:] or ["--help"]
    sys.path[:1] = [str(Path.cwd()), str(TEMPLATE)]
    # For the processes that a step starts with `python -m`, which adds the working directory by itself.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TEMPLATE), os.environ.get("PYTHONPATH")]))
    known = entry_points()
    if name == "--version":
        print(f"alacarte {alacarte.__version__}")
        return 0
    if name in ("--help", "-h"):
        print("alacarte ENTRY_POINT [KEY=VALUE ...]; alacarte ENTRY_POINT --help lists the keys\n")
        print("\n".join(f"  {name:10} {about}" for name, (_, about) in known.items()))
        return 0
    if name not in known:
        print(f"alacarte: {name} is not an entry point: {nearest(name, known)}", file=sys.stderr)
        return 2
    extra = EXTRAS.get(name, "train")
    if package := missing_package(extra):  # before hours of training
        print(f"{name}: {package} is not installed: pip install 'alacarte[{extra}]'", file=sys.stderr)
        return 2
    sys.argv[1:] = arguments
    runpy.run_module(known[name][0], run_name="__main__", alter_sys=True)
    return 0


def missing_package(extra: str) -> str | None:
    """A package of an extra that is not installed."""
    with suppress(PackageNotFoundError):  # a checkout that is not installed
        for requirement in map(Requirement, requires("alacarte") or ()):
            if requirement.marker and requirement.marker.evaluate({"extra": extra}):
                try:
                    version(requirement.name)
                except PackageNotFoundError:
                    return requirement.name
    return None


def entry_points() -> dict[str, tuple[str, str]]:
    """Name -> module and description, read from the scripts, because importing them takes seconds."""
    points = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations if spec else None) or ()
        for path in sorted(file for folder in folders for file in Path(folder).glob("*.py")):
            text = path.read_text()
            if point := re.search(r'^@launch\.step\("(\w+)"', text, re.M):
                about = re.match(rf'"""(?:{point[1]}: )?(.+)', text)
                points[point[1]] = (f"{package}.{path.stem}", about[1].rstrip('"') if about else "")
    return points


if __name__ == "__main__":
    sys.exit(main())
