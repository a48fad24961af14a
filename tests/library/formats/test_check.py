"""skops files: what is refused is refused before anything is made of it, and every estimator of scikit-learn is accepted."""

import importlib
import io
import json
import operator
import os
import pkgutil
import socket
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn
from scipy.sparse import issparse
from sklearn.base import is_classifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.experimental import enable_halving_search_cv, enable_iterative_imputer  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import all_estimators
from sklearn.utils._test_common.instance_generator import _construct_instances
from threadpoolctl import threadpool_limits

from alacarte import formats
from alacarte.errors import UserError
from alacarte.formats.classes import CLASSES, FUNCTIONS, LOSSES, is_class

RNG = np.random.default_rng(0)
X = np.abs(RNG.normal(size=(40, 4)))
LABELS, NUMBERS = (X[:, 0] > X[:, 1]).astype(int), X[:, 0] + 0.1
BOTH = np.stack([LABELS, 1 - LABELS], 1)
TEXTS = ["red green blue", "green blue grey", "white black red red"] * 10
RECORDS = [{"a": 1, "b": 2}, {"a": 3, "c": 1}] * 10

# Tables, one of which each estimator can be fitted to.
TABLES: list[tuple] = [
    *((X, NUMBERS), (X, LABELS), (X, BOTH + 0.1 * X[:, :2]), (X, BOTH), (X,), (TEXTS,), (RECORDS,), (LABELS,), (BOTH,)),
    *(([[1, 2], [3]],), (X[:, :1], NUMBERS), (X @ X.T,)),
]
ESTIMATORS: dict[str, type] = dict(all_estimators())
UNHELD = {"Birch"}  # public estimators that skops itself cannot hold


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of small models wait for each other."""
    with threadpool_limits(1):
        yield


# --- every estimator ---


def instance(cls: type) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "FrozenEstimator": lambda: FrozenEstimator(LogisticRegression().fit(X, LABELS)),
        "SparseCoder": lambda: cls(dictionary=np.eye(4)),
        "FeatureHasher": lambda: cls(n_features=64),
        "HashingVectorizer": lambda: cls(n_features=64),
    }
    if cls.__name__ in made:
        return made[cls.__name__]()
    if cls.__module__ == "sklearn.feature_extraction.text" or cls.__name__.startswith(("KNeighbors", "SV")):
        return cls()
    return next(iter(_construct_instances(cls)))


def fit(estimator: Any) -> tuple[Any, Any]:
    """The fitted estimator and the rows that it was fitted to."""
    tables = [(X, LABELS), *TABLES] if is_classifier(estimator) else TABLES
    special = {"CountVectorizer": TEXTS, "TfidfVectorizer": TEXTS, "HashingVectorizer": TEXTS, "FeatureHasher": RECORDS}
    first = {**special, "PatchExtractor": RNG.normal(size=(5, 20, 20))}.get(type(estimator).__name__)
    for table in tables if first is None else [(first,)]:
        with suppress(Exception):  # most estimators fit only some tables
            return estimator.fit(*table), table[0]
    raise AssertionError(f"{estimator} fits none of the tables")


def answers(estimator: Any, rows: Any) -> dict[str, Any]:
    """All that a fitted estimator gives for rows; its arrays where it has no method for rows."""
    out = {}
    for method in ("predict", "predict_proba", "decision_function", "transform", "score_samples", "kneighbors"):
        if hasattr(estimator, method):
            out[method] = getattr(estimator, method)(rows)
    out = out or {name: value for name, value in vars(estimator).items() if isinstance(value, np.ndarray)}
    assert out
    return {name: value.toarray() if issparse(value) else value for name, value in out.items()}


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - UNHELD))
def test_every_estimator_is_saved_checked_and_loaded(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = instance(ESTIMATORS[name])
        if "random_state" in estimator.get_params():
            estimator.set_params(random_state=0)
        estimator, rows = fit(estimator)
        formats.save_skops(estimator, tmp_path / "model.skops")
        again = formats.load_skops(tmp_path / "model.skops")
        expected = answers(estimator, rows)
        for method, values in answers(again, rows).items():
            close = np.asarray(values).dtype.kind == "f"  # the last bits differ where arrays lie otherwise in memory
            (partial(np.testing.assert_allclose, rtol=1e-9) if close else np.testing.assert_equal)(
                values, expected[method]
            )


@pytest.mark.parametrize("name", sorted(UNHELD))
def test_an_estimator_that_skops_cannot_hold_is_refused_when_saved(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="skops cannot save it"):
        formats.save_skops(ESTIMATORS[name]().fit(X), tmp_path / "model.skops")


# --- names ---


def dump(model: object, path: Path) -> Path:
    formats.skops_io().dump(model, path)
    return path


def forge(path: Path, node: dict, **more: object) -> Path:
    """A skops file of a StandardScaler one of whose attributes is `node`."""
    with zipfile.ZipFile(path, "w") as archive:
        schema = json.loads(scaler())
        schema["content"]["content"]["copy"] = node
        archive.writestr("schema.json", json.dumps({**schema, **more}))
    return path


@cache
def scaler() -> bytes:
    with zipfile.ZipFile(io.BytesIO(formats.skops_io().dumps(StandardScaler()))) as archive:
        return archive.read("schema.json")


def json_node(value: object) -> dict:
    return {"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": json.dumps(value)}


def dict_node(**values: object) -> dict:
    types = [{"__class__": "str", "__module__": "builtins", "__loader__": "TypeNode"} for _ in values]
    keys = {"__class__": "list", "__module__": "builtins", "__loader__": "ListNode", "content": types}
    content = {name: json_node(value) for name, value in values.items()}
    return {
        "__class__": "dict",
        "__module__": "builtins",
        "__loader__": "DictNode",
        "key_types": keys,
        "content": content,
    }


def object_node(module: str, name: str, **attributes: object) -> dict:
    return {"__class__": name, "__module__": module, "__loader__": "ObjectNode", "content": dict_node(**attributes)}


def call(module: str, name: str, *arguments: object) -> dict:
    """A node that calls module.name(*arguments) while the file loads."""
    items = [json_node(value) for value in arguments]
    content = {"__class__": "tuple", "__module__": "builtins", "__loader__": "TupleNode", "content": items}
    return {"__class__": name, "__module__": module, "__loader__": "ConstructorFromReduceNode", "content": content}


def load_unchecked(path: Path) -> Any:
    skops = formats.skops_io()
    return skops.load(path, trusted=skops.get_untrusted_types(file=path))


def importable_classes() -> Iterator[tuple[str, str, type]]:
    """(module, name, class) of every class that a module under sklearn gives, wherever the class is defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for info in pkgutil.walk_packages(sklearn.__path__, "sklearn.", onerror=lambda name: None):
            if ".tests" in info.name or info.name.endswith("conftest"):
                continue
            try:
                module = importlib.import_module(info.name)
            except ImportError:  # needs a package that is not installed, such as Cython
                continue
            yield from (
                (info.name, name, value) for name, value in list(vars(module).items()) if isinstance(value, type)
            )


def test_every_class_outside_the_list_is_refused(tmp_path: Path) -> None:
    classes, refused, listed = set(importable_classes()), 0, set()
    assert len(classes) > 2000 and ("sklearn.datasets._covtype", "TemporaryDirectory") in {each[:2] for each in classes}
    for module, name, cls in sorted(classes, key=str):
        if is_class(module, name) and (cls.__module__, cls.__qualname__) == (module, name):
            listed.add(cls)
            continue
        refused += 1
        path = forge(tmp_path / "model.skops", object_node(module, name))
        output = rf"needs {module}\.{name} in a ObjectNode|{module}\.{name} is not defined there"
        with pytest.raises(UserError, match=output):
            formats.load_skops(path)
    assert refused > len(classes) / 2
    assert {cls for name, cls in ESTIMATORS.items() if name not in UNHELD} <= listed
    assert len(listed) == sum(package.startswith("sklearn.") for package, _ in CLASSES), "two classes of one name"


def test_the_lists_name_what_is_defined_there() -> None:
    packages = {package for package, _ in CLASSES}
    assert not packages & {"sklearn.callback", "sklearn.datasets", "sklearn.externals"}
    for module, name in LOSSES:
        cls = getattr(importlib.import_module(module), name)
        assert (cls.__module__, cls.__qualname__) == (module, name)
    for module, name in FUNCTIONS - {("pandas", "NA")}:
        assert callable(getattr(importlib.import_module(module), name))


def test_a_class_that_is_defined_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of scikit-learn could have it: the name on the list leads to another class."""
    from sklearn.linear_model import _base

    path = dump(_base.LinearRegression().fit(X, NUMBERS), tmp_path / "model.skops")
    monkeypatch.setattr(_base, "LinearRegression", StandardScaler)
    with pytest.raises(UserError, match="is not defined there"):
        formats.check_types(path)


@pytest.mark.parametrize(
    "gadget",
    [
        np.load,
        pd.read_pickle,
        os.system,
        partial(np.load, allow_pickle=True),
        operator.methodcaller("to_pickle", "stolen"),
        operator.attrgetter("__class__"),
        RandomForestClassifier().fit,
        io.StringIO,
    ],
)
def test_a_function_that_is_not_named_is_refused(gadget: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"alacarte/formats/(check|classes)\.py: not loaded"):
        formats.load_skops(dump(FunctionTransformer(gadget), tmp_path / "model.skops"))


@pytest.mark.parametrize(
    "kind", ["DictNode", "ListNode", "SetNode", "TupleNode", "TypeNode", "LossNode", "NdArrayNode"]
)
def test_a_class_is_accepted_in_its_own_kind_of_node_only(kind: str, tmp_path: Path) -> None:
    """Most nodes call the class that they name: a class that may be made without its constructor is not called."""
    node = {"__class__": "StandardScaler", "__module__": "sklearn.preprocessing._data", "__loader__": kind}
    with pytest.raises(UserError, match=rf"needs sklearn\.preprocessing\._data\.StandardScaler in a {kind}"):
        formats.check_types(forge(tmp_path / "model.skops", node))


def test_ufuncs_are_accepted(tmp_path: Path) -> None:
    formats.save_skops(FunctionTransformer(np.log1p), tmp_path / "model.skops")
    assert formats.load_skops(tmp_path / "model.skops").func is np.log1p


def test_a_call_in_the_file_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """scipy and numpy have classes whose constructor writes a file: skops would call them, once their name is trusted."""
    victim = tmp_path / "victim"
    path = forge(tmp_path / "model.skops", call("scipy.io", "FortranFile", str(victim), "w"))
    load_unchecked(path)
    assert victim.exists(), "the forged file is no attack any more"
    victim.unlink()
    with pytest.raises(UserError, match=r"FortranFile comes in a ConstructorFromReduceNode"):
        formats.load_skops(path)
    assert not victim.exists()


def test_an_object_that_connects_to_an_address_is_refused(tmp_path: Path) -> None:
    handle = call("sklearn.callback._transport", "ListenerHandle", str(tmp_path / "socket"), "")
    node = object_node("sklearn.callback._scoring_monitor", "ScoringMonitor")
    node["content"]["content"]["_listener_handle"] = handle
    node["content"]["key_types"]["content"].append(
        {"__class__": "str", "__module__": "builtins", "__loader__": "TypeNode"}
    )
    path = forge(tmp_path / "model.skops", node)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        listener.setblocking(False)
        with pytest.raises(UserError, match="not loaded"):
            formats.load_skops(path)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_an_older_protocol_and_what_is_no_skops_file_are_refused(tmp_path: Path) -> None:
    # protocol 0 names functions where the check does not look
    node = {"__class__": "asarray", "__module__": "numpy", "__loader__": "FunctionNode"}
    node["content"] = {"module_path": "numpy", "function": "asarray"}
    with pytest.raises(UserError, match="protocol 0"):
        formats.check_types(forge(tmp_path / "old.skops", node, protocol=0))
    for content in (b"\x80\x04K\x01.", b"", b"PK\x05\x06" + bytes(18)):
        (tmp_path / "model.skops").write_bytes(content)
        with pytest.raises(UserError, match="not a skops file"):
            formats.load_skops(tmp_path / "model.skops")


class Own(StandardScaler):
    pass


def test_a_class_of_ones_own_is_refused_when_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Own.*alacarte/formats/classes\.py"):
        formats.save_skops(Own(), tmp_path / "model.skops")
