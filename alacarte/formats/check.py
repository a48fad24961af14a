"""Model files that unpickle nothing: scikit-learn parts as skops behind a list of names, torch as safetensors plus JSON.

skops rebuilds objects from a JSON tree and lists the types it wants to be told to trust, but it is no sandbox: some of
its nodes call a function that the file names (`ConstructorFromReduceNode`, `MethodNode`, ...), it trusts many names by
itself, and MLflow reads the list of trusted types from the model. So each name in a file is checked here against
alacarte/formats/classes.py, before anything is made from the file. After that, and before anything is called,
alacarte/formats/objects.py checks the attributes and the arrays of the objects.
Written against skops 0.16 (skops/io/_audit.py and the nodes in _general.py, _numpy.py, _sklearn.py, _scipy.py).
"""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType, ModuleType
from typing import Any, BinaryIO
from zipfile import ZipFile

from alacarte.errors import UserError
from alacarte.folders import ROOT, TEMPLATE
from alacarte.formats.classes import NODES, is_class
from alacarte.formats.frameworks import import_extra, resolve
from alacarte.formats.objects import check_object

# Older protocols name functions elsewhere in the tree, where the check below does not look.
PROTOCOL = 2

PROJECT = "project"  # the package of the team, whose classes and functions a model may contain

MAX_SCHEMA = 2**28  # bytes of the JSON tree in a skops file: a text feature of a million words needs 200 MB


def check_types(file: str | Path | BinaryIO, path: object = "the model") -> list[str]:
    """All names in a skops file, sorted, as "module.name".

    Raises UserError for the first name or node that is not on a list, and for a file that is no skops file. Nothing
    is made from the file, and no module is imported outside the packages of the lists and the checkout.
    """
    try:
        with ZipFile(file) as archive:
            if (size := archive.getinfo("schema.json").file_size) > MAX_SCHEMA:
                raise UserError(f"schema.json has {size} bytes, allowed are {MAX_SCHEMA}")
            schema = json.loads(archive.read("schema.json"))
        protocol = schema["protocol"]
        nodes = {
            (node["__loader__"], node["__module__"], node["__class__"]) for node in objects_in(schema, "__loader__")
        }
    except Exception as error:  # a forged file can break the reader anywhere; it is refused whatever the error is
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path}: not a skops file that can be read: {reason}") from error
    if protocol != PROTOCOL:
        raise UserError(f"{path}: skops protocol {protocol!r}, allowed is {PROTOCOL}; train and log the model again")
    for kind, module, name in sorted(nodes, key=str):
        full_name = f"{module}.{name}"
        if kind != "ObjectNode" and kind not in NODES:
            raise UserError(
                f"{path}: {full_name} comes in a {kind}, which is not in NODES of alacarte/formats/classes.py: not loaded"
            )
        if module.startswith(f"{PROJECT}.") and kind in ("ObjectNode", "FunctionNode"):
            _check_own(path, full_name, type if kind == "ObjectNode" else FunctionType)
            continue
        is_listed = is_class(module, name) if kind == "ObjectNode" else (module, name) in NODES[kind]
        if not is_listed and not (kind == "FunctionNode" and full_name in _ufuncs()):
            raise UserError(
                f"{path}: needs {full_name} in a {kind}, which is not in alacarte/formats/classes.py: not loaded or saved"
            )
        if kind in ("ObjectNode", "LossNode"):
            _check_home(path, module, name)
    return sorted({f"{module}.{name}" for _, module, name in nodes})


def save_skops(model: object, file: str | Path | BinaryIO) -> list[str]:
    """Write `model` to `file`; the names that MLflow must tell skops to trust. UserError when it cannot be loaded again."""
    try:
        skops_io().dump(model, file)
        check_types(file)
        listed = skops_io().get_untrusted_types(file=file)
    except TypeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"skops cannot save it: {reason}; keep numbers, texts, lists and arrays in its attributes, or choose another class"
        ) from error
    check_object(model, "the model")
    return listed


def load_skops(path: str | Path) -> Any:
    """The object in a skops file, made only after check_types has passed, and given only if check_object passes."""
    with Path(path).open("rb") as file:
        try:
            model = skops_io().load(file, trusted=check_types(file, path))
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{path}: not a skops file that can be read: {reason}") from error
    check_object(model, str(path))
    return model


def copy_project(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Copy `project` into a model folder whose model needs names of it. Return the entry of its flavors for the copy.

    The copy is for stock MLflow in a process without `project`. The steps and the server use the checkout only.
    """
    if not any(name.startswith(f"{PROJECT}.") for name in names):
        return {}
    origin = next(home for home in (ROOT, TEMPLATE) if (home / PROJECT).is_dir()) / PROJECT
    shutil.copytree(origin, folder / "code" / PROJECT, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return {"code": "code"}


def make_folder(key: str, path: str) -> Path:
    """The folder that a model will be saved to, made before there is a model; `key` is the setting that names it.

    Raises UserError where it cannot be made or written, or holds something.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{key}={path} is not empty: name a new folder")
        with TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{key}={path} cannot be written: {error.strerror}; name another folder") from None
    return folder


@cache
def skops_io() -> ModuleType:
    """skops.io, imported late: it imports all of scikit-learn, and by accident torch (0.6 s and another 1.5 s of CPU)."""
    # scikit-learn's list of estimators walks all its packages, and one of them imports torch. None in that package's
    # place makes the walk skip it.
    shim = "sklearn.externals.array_api_compat.torch"
    blocked = shim not in sys.modules
    if blocked:
        sys.modules[shim] = None  # type: ignore[assignment]
    try:
        import pandas as pd
        import skops.io
        from skops.io._utils import _get_state
    finally:
        if blocked:
            del sys.modules[shim]
    # skops cannot hold pandas.NA, the one marker with which SimpleImputer finds None, nan, NaT and NA alike. By its
    # name it can, and any skops then loads it, with no code of ours.
    named = {"__module__": "pandas", "__class__": "NA", "__loader__": "FunctionNode"}
    _get_state.register(type(pd.NA))(lambda obj, save_context: dict(named))
    return skops.io


@cache
def _ufuncs() -> frozenset[str]:
    skops_io()
    from skops.io._trusted_types import NUMPY_UFUNC_TYPE_NAMES, SCIPY_UFUNC_TYPE_NAMES

    return frozenset(NUMPY_UFUNC_TYPE_NAMES + SCIPY_UFUNC_TYPE_NAMES)


def _check_home(path: object, module: str, name: str) -> None:
    """Refuse a class that another version of scikit-learn only imports into the module that the list names."""
    try:
        cls = getattr(import_extra(module), name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ImportError, AttributeError):
        cls = None
    if not isinstance(cls, type) or (cls.__module__, cls.__qualname__) != (module, name):
        raise UserError(f"{path}: {module}.{name} is not defined there in this installation: not loaded")


def _check_own(path: object, name: str, kind: type) -> None:
    """Refuse all but the classes and functions that a module of `project` in this checkout defines."""
    try:
        own = resolve(name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(own, kind):
        kinds = "class" if kind is type else "function"
        raise UserError(
            f"{path}: {name} is no {kinds} at the top level of a module of this checkout: not loaded or saved"
        )


def objects_in(tree: object, key: str) -> Iterator[dict]:
    """Every object in JSON that has a key, wherever it is."""
    branches = [tree]
    while branches:
        branch = branches.pop()
        if isinstance(branch, dict):
            if key in branch:
                yield branch
            branches.extend(branch.values())
        elif isinstance(branch, list):
            branches.extend(branch)
