"""Which source made a run: one hash of the modules that a step imports, and the commit of git."""

import contextlib
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from alacarte.folders import OURS, ROOT

IMPORT = re.compile(r"(?:^|[:;])[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|.+)|import[ \t]+(.+))", re.M)
DOTTED = re.compile(rf"[\"']((?:{'|'.join(OURS)})(?:\.\w+)+)")


def source_hash(step: str, cfg: object = None) -> str:
    """Hash of the source that a step runs, as it is on disk, and of the versions of its dependencies."""
    digest = hashlib.sha256(sys.version.encode())
    for name, path in sorted(source_of(step, cfg).items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    if (pins := ROOT / "requirements.txt").is_file():
        digest.update(pins.read_bytes())
    with contextlib.suppress(PackageNotFoundError):  # a checkout, which has the pins
        for name in sorted({re.split(r"[^\w.-]", line)[0] for line in requires("alacarte") or ()}):
            with contextlib.suppress(PackageNotFoundError):  # of an extra that is not installed
                digest.update(f"{name}=={version(name)}".encode())
    return digest.hexdigest()


def source_of(step: str, cfg: object = None) -> dict[str, Path]:
    """The step's script, the modules that `cfg` names, and all modules that these import: name -> file.

    An entry point without a script of its name, such as `main`, starts other steps: its source is every module.
    """
    available = _available_modules()
    if f"steps.{step}" not in available:
        return available
    return modules_of([f"steps.{step}", *_texts(cfg)], available)


def modules_of(names: Iterable[str], available: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """The modules behind dotted names and the modules that they import, without other packages: name -> file.

    An import inside a function counts, and so does a dotted name in a string. Imports are found by a pattern, because
    parsing takes a second. A line that only looks like an import adds a module too many, never too few.
    """
    available = available or _available_modules()
    modules: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        words = waiting.pop().split(".")
        for name in (".".join(words[:n]) for n in range(1, len(words) + 1)):
            if name in available and name not in modules:
                modules[name] = available[name]
                waiting += _names_in(modules[name].read_text(), name, modules[name].stem == "__init__")
    return modules


def _available_modules() -> dict[str, Path]:
    """Every module of the packages that decide a result: name -> the file that Python would import."""
    available: dict[str, Path] = {}
    for package, folder in itertools.product(OURS, sys.path):
        for path in Path(folder, package).rglob("*.py"):
            name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            available.setdefault(name, path)
    return available


def _names_in(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports or writes as a text."""
    for origin, members, plain_imports in IMPORT.findall(source.replace("\\\n", " ")):
        if level := len(origin) - len(origin.lstrip(".")):  # relative to the package
            package = module.split(".")[: len(module.split(".")) + is_package - level]
            origin = ".".join([*package, *filter(None, [origin.lstrip(".")])])
        yield from (f"{origin}.{member}" for member in re.findall(r"\w+", members))
        yield from re.findall(r"[\w.]+", plain_imports)
    yield from DOTTED.findall(source)


def _texts(node: object) -> Iterator[str]:
    """Every text in a configuration."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping | list):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from _texts(value)


def git_tags(files: Iterable[Path] | None = None) -> dict[str, str]:
    """The commit, and `git_dirty`: whether one of `files` differs from it. {} outside a git checkout.

    Without `files`, every file that git knows in the project counts. A folder staged for Databricks brings its tags.
    """
    if (staged := ROOT / "git_tags.json").is_file():  # by alacarte/databricks/stage.py
        return json.loads(staged.read_text())

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return {}
    if files is None:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    else:  # an installed library is outside the checkout
        inside = [str(path) for path in map(Path.resolve, files) if path.is_relative_to(ROOT)]
        changed = git("status", "--porcelain", "--untracked-files=all", "--", "conf", "requirements.txt", *inside)
    return {MLFLOW_GIT_COMMIT: commit, "git_dirty": str(bool(changed)).lower()}
