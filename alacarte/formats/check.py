"""Model files that unpickle nothing: scikit-learn parts as skops behind an allow-list, torch as safetensors plus JSON.

skops rebuilds objects from a JSON tree and lists the types it wants to be told to trust, but it is no sandbox: some of
its nodes call what they name (`ConstructorFromReduceNode`, `MethodNode`, ...), and MLflow reads the list of trusted types
from the model itself. So every file is checked here, before anything is made from it. The check says what may be
built, not that the numbers inside make sense: a forged tree can still crash the process that predicts with it.
Written against skops 0.16 (skops/io/_audit.py and the nodes in _general.py, _numpy.py, _sklearn.py, _scipy.py).
"""

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, BinaryIO
from zipfile import ZipFile

import yaml

from alacarte.errors import UserError

# What is accepted by its exact name. Whatever stands here may be called with any argument: nothing that reads, writes,
# imports or evaluates belongs on this list (numpy.load and pandas.read_pickle are functions too).
TYPES = (
    "numpy.asarray",  # the casts in learners/features.py
    "numpy.dtype",
    "pandas.NA",
    "sklearn.utils._bunch.Bunch",  # a dict, in VotingClassifier and its like
    "sklearn.metrics._classification.accuracy_score",  # in what searches or tunes: GridSearchCV(scoring="accuracy")
    "sklearn.metrics._classification.balanced_accuracy_score",
)

# Nodes that make an object with `cls.__new__` and set its attributes; they call no constructor, so any class that
# scikit-learn itself brings is accepted in them.
INSTANCES = {"ObjectNode", "TreeNode"}

# Nodes that hold data or one name. Left out on purpose, because they call or bind what the file names: MethodNode,
# PartialNode, OperatorFuncNode, ConstructorFromReduceNode.
NODES = INSTANCES | {
    *("JsonNode", "DictNode", "DefaultDictNode", "ListNode", "SetNode", "TupleNode", "SliceNode", "BytesNode"),
    *("BytearrayNode", "NdArrayNode", "MaskedArrayNode", "DTypeNode", "RandomStateNode", "RandomGeneratorNode"),
    *("SparseMatrixNode", "LossNode", "TypeNode", "FunctionNode", "CachedNode"),
}

# Older protocols name functions elsewhere in the tree, where the check below does not look.
PROTOCOL = 2

PICKLES = {".pkl", ".pickle", ".cloudpickle", ".joblib", ".pth", ".pt", ".ckpt", ".bin"}


def check_types(file: str | Path | BinaryIO) -> list[str]:
    """Names of the types in a skops file that skops does not trust by itself, all of them on the allow-list.

    Raises UserError for the first type or node that is not allowed, and for a file that is no skops file. Nothing
    in the file is made or imported.
    """
    path = file if isinstance(file, str | Path) else "the model"
    try:
        with ZipFile(file) as archive:
            schema = json.loads(archive.read("schema.json"))
        protocol, listed = schema["protocol"], skops_io().get_untrusted_types(file=file)
        nodes = [(node["__loader__"], f"{node['__module__']}.{node['__class__']}") for node in _nodes(schema)]
    except Exception as error:  # a forged file can break the reader anywhere; whatever breaks it, it is refused
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not a skops file that can be read: {reason}") from error
    if protocol != PROTOCOL:
        raise UserError(f"{path}: skops protocol {protocol!r}, allowed is {PROTOCOL}; train and log the model again")
    for node, name in nodes:
        if node not in NODES:
            raise UserError(
                f"{path}: {name} comes in a {node}, which is not in NODES of alacarte/formats/check.py: not loaded"
            )
    for name in listed:
        found_in = {node for node, named in nodes if named == name}
        instance_of_sklearn = name.startswith("sklearn.") and found_in and found_in <= INSTANCES
        if name not in TYPES and not instance_of_sklearn:
            raise UserError(
                f"{path}: needs {name}, which is not in TYPES of alacarte/formats/check.py: not loaded or saved"
            )
    return listed


def save_skops(model: object, file: str | Path | BinaryIO) -> list[str]:
    """Write `model` to `file`; the names that check_types gives for it. UserError when skops cannot hold the model."""
    try:
        skops_io().dump(model, file)
    except TypeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"skops cannot save this model: {reason}; choose another model.estimator._target_") from error
    return check_types(file)


def load_skops(path: str | Path) -> Any:
    """The object in a skops file, made only after check_types has passed."""
    return skops_io().load(path, trusted=check_types(path))


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


def inspect(folder: str | Path) -> str:
    """ "sklearn" or "torch": the format of an MLflow model folder that learners.load reads. Makes nothing of it.

    "sklearn" is MLflow's sklearn flavor in skops (`model.skops`), ours or another's; "torch" is the folder that
    learners/torch.py writes. Raises UserError for pickles in any dress and for everything else.
    """
    folder = Path(folder)
    if not (folder / "MLmodel").is_file():
        raise UserError(f"{folder}: no file MLmodel in it, so not an MLflow model folder")
    pickles = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix.lower() in PICKLES)
    flavors = (yaml.safe_load((folder / "MLmodel").read_text()) or {}).get("flavors", {})
    # MLflow takes a flavor that does not say for a pickle.
    sklearn_format = flavors.get("sklearn", {"serialization_format": "skops"}).get("serialization_format", "pickle")
    if pickles or sklearn_format != "skops":
        what = ", ".join(pickles) or f"the sklearn flavor in {sklearn_format}"
        raise UserError(
            f"{folder}: {what}: pickles are not loaded; log the model again as skops or with model=torch_mlp"
        )
    if "sklearn" in flavors and (folder / "model.skops").is_file():
        return "sklearn"
    torch_files = ("net.json", "weights.safetensors", "preprocess.skops")
    if "pytorch" in flavors and all((folder / "data/network" / name).is_file() for name in torch_files):
        return "torch"
    raise UserError(
        f"{folder}: flavors {sorted(flavors)}; allowed are sklearn in skops, and torch as model=torch_mlp logs it"
    )


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


def _nodes(tree: object) -> Iterator[dict]:
    """Every node in a skops schema, read anywhere in it; more than skops makes, never less."""
    if isinstance(tree, dict):
        if "__loader__" in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _nodes(branch)
