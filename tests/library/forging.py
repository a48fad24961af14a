"""Models that pass as files and end, or block, the process that predicts with them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier

ROWS = pd.DataFrame(np.random.default_rng(0).normal(size=(80, 2)), columns=["a", "b"])
LABELS = (ROWS["a"] + ROWS["b"] > 0).astype(int)

FAR = 10**8  # entries of an array, which is outside the memory of the process


def rewrite(file: Path, edit: Callable[[str, bytes], bytes], compression: int = ZIP_STORED, **more: bytes) -> None:
    """Write a skops or Keras file again with each entry changed by `edit(name, content)`, and with `more` entries."""
    with ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()} | more
    with ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, edit(name, content))


def in_json(entry: str, change: Callable[[dict], None]) -> Callable[[str, bytes], bytes]:
    """An edit for `rewrite`: `change` edits the content of one JSON entry in place."""

    def edit(name: str, content: bytes) -> bytes:
        if name != entry:
            return content
        tree = json.loads(content)
        change(tree)
        return json.dumps(tree).encode()

    return edit


def change_arrays(file: Path, change: Callable[[np.ndarray], None]) -> None:
    """Let `change(array)` edit each array of a skops file in place; the file is written again."""

    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith(".npy"):
            return content
        array = np.load(io.BytesIO(content), allow_pickle=False)
        change(array)
        out = io.BytesIO()
        np.save(out, array, allow_pickle=False)
        return out.getvalue()

    rewrite(file, edit)


def children_of_the_roots(child: int) -> Callable[[np.ndarray], None]:
    """A change of trees: both children of each root are the node with this number."""

    def change(array: np.ndarray) -> None:
        for name in ("left_child", "right_child", "left", "right"):
            if name in (array.dtype.names or ()):
                array[name].flat[0] = child

    return change


def neighbours_far_away(array: np.ndarray) -> None:
    if "idx_end" in (array.dtype.names or ()):
        array["idx_end"] = FAR


FORGERIES: dict[str, tuple[Any, Callable[[np.ndarray], None]]] = {
    "tree with a child far away": (DecisionTreeClassifier(max_depth=3), children_of_the_roots(FAR)),
    "tree that turns in a circle": (DecisionTreeClassifier(max_depth=3), children_of_the_roots(0)),
    "boosted tree that turns in a circle": (HistGradientBoostingClassifier(max_iter=2), children_of_the_roots(0)),
    "neighbours far away": (KNeighborsClassifier(3, algorithm="kd_tree", leaf_size=5), neighbours_far_away),
}

# Models whose own code, which runs with serve.trust_code=true, does the same on predict.
CODE = {
    "crash": "os.kill(os.getpid(), signal.SIGSEGV)",
    "loop": "while True: pass",
    "memory": "kept = [bytearray(2**26) for _ in range(2**20)]",
}


def code_of(deed: str) -> str:
    """A model's source file. It does the deed when it predicts, but not while it is logged."""
    return f"""
import os, signal
import mlflow

class Forged(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        if not os.environ.get("WHILE_LOGGED"):
            {deed}
        return model_input["a"].tolist()

mlflow.models.set_model(Forged())
"""
