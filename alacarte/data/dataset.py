"""Data sets: call a loader, decide the task, split the rows by hash, and identify the result by its digest.

A loader (`data._target_`) returns one DataFrame that contains the target column; all other work is the same for all loaders.
The part of a row depends only on the row, so it stays the same when other rows are added, removed or reordered.
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import logging
import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from alacarte.data import tables
from alacarte.data.splits import PARTS, check_parts, checked_split, hash_rows, hash_split
from alacarte.errors import UserError

if TYPE_CHECKING:
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.data.pandas_dataset import PandasDataset

MOST_INTEGER_CLASSES = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A typed and split table of n rows."""

    X: pd.DataFrame  # (n, columns), each of a type that `tables.plain_column` gives
    y: pd.Series  # (n,), none missing: labels (str, int64 or bool), or float64
    split: np.ndarray  # (n,): "train", "val" or "test"
    task: str  # "classification" or "regression"
    name: str
    target: str
    source: str  # absolute path, URL, or the dotted name of what made the rows
    digest: str  # 16 hex digits: of columns and their types, rows in their order, target and split

    def part(self, name: str) -> tuple[pd.DataFrame, pd.Series]:
        """Inputs and target of "train", "val" or "test"."""
        assert name in PARTS, name
        rows = self.split == name
        return self.X[rows], self.y[rows]

    @property
    def is_trained_on(self) -> np.ndarray:
        """(n,) bool: the rows of the train and val parts."""
        return np.isin(self.split, ("train", "val"))


def load_data(
    *,
    _target_: str,
    name: str | None = None,
    target: str,
    task: str = "auto",
    key: str | None = None,
    drop: Sequence[str] = (),
    split: Mapping[str, Any] | None = None,
    **loader_arguments: Any,
) -> Dataset:
    """Call the loader `_target_` with `loader_arguments` and make its DataFrame a Dataset.

    `task="auto"`: text, booleans and the category dtype mean classification; so do whole numbers (also stored as floats)
    with at most 20 distinct values that each come five times on average; all other numbers mean regression.
    A row's part is decided by its inputs, never by its label, so that rows with equal inputs stay together; or by the
    column `key` alone, which then is no input. `drop` lists columns to leave out.
    `split` is {"val": fraction, "test": fraction, "seed": integer}, see `hash_split`. `name` defaults to the file's
    stem, or to the loader's name. Rows without a target are left out, and infinite inputs count as missing; both warn.

    Raises UserError, in one line, for whatever in the arguments or in the rows leaves no model to learn.
    """
    if split is None:
        raise UserError(
            "data.split is missing: add split: {val: 0.15, test: 0.2, seed: 0}, as conf/data/digits.yaml has it"
        )
    fractions = checked_split(split)
    if task not in ("auto", "classification", "regression"):
        raise UserError(f"data.task={task}: use auto, classification or regression")
    frame, source = _call_loader(_target_, loader_arguments)
    target, key = str(target), None if key is None else str(key)
    drop = [str(column) for column in ([drop] if isinstance(drop, str) else drop or ())]
    for setting, columns in (("target", [target]), ("key", [] if key is None else [key]), ("drop", drop)):
        for column in columns:
            if column not in frame.columns:
                hint = tables.nearest(column, frame.columns)
                raise UserError(f"data.{setting}={column}: {source} has no such column: {hint}")
    if target in (key, *drop):
        raise UserError(f"data.target={target} is also in data.key or data.drop: take it out of there")
    missing = frame[target].isna()
    if missing.all():
        raise UserError(f"data.target={target}: none of the {len(frame)} rows has a value: name another column")
    if missing.any():
        logger.warning(
            "data.target=%s: %d of %d rows have no value and are left out", target, missing.sum(), len(frame)
        )
        frame = frame[~missing]
    frame = frame.reset_index(drop=True)
    y, task = _target(frame[target], task)
    X = pd.DataFrame({column: _input(frame[column]) for column in frame.columns if column not in (target, key, *drop)})
    if X.columns.empty:
        raise UserError(f"data.target={target}: {source} has no other column to predict it from")

    rows = hash_rows(X)
    groups = rows if key is None else hash_rows(tables.plain_column(frame[key]).to_frame())
    split_of_rows = hash_split(groups, **fractions)
    check_parts(y, split_of_rows, groups, task, fractions)
    types = [f"{column}: {dtype}" for column, dtype in X.dtypes.items()]
    digest = hashlib.blake2b(json.dumps([types, target, str(y.dtype), task]).encode(), digest_size=8)
    for values in (rows, hash_rows(y.to_frame()), split_of_rows.astype("S5")):
        digest.update(values.tobytes())
    path = loader_arguments.get("path")
    stem = PurePath(tables.SUFFIX.split(str(path))[0]).name if path else _target_.rpartition(".")[2]
    return Dataset(X, y, split_of_rows, task, name or stem, target, source, digest.hexdigest())


class DataReader:
    """Reads each data group once, however often it is asked for."""

    def __init__(self) -> None:
        self._datasets: dict[str, Dataset] = {}

    def __call__(self, data: Mapping[str, Any]) -> Dataset:
        """What `load_data` makes of a data group of the configuration."""
        path = {"path": tables.absolute(str(data["path"]))} if data.get("path") else {}
        key = json.dumps({**data, **path}, sort_keys=True, default=str)
        if key not in self._datasets:
            self._datasets[key] = load_data(**data)
        return self._datasets[key]

    def recorded(self, metadata: Mapping[str, Any], model: str, *, check_digest: bool = True) -> Dataset:
        """The data that a model records in its `metadata`. `model` names it in messages.

        UserError where it records no data, where they cannot be read, and, with `check_digest`, where they have changed.
        """
        data, digest = metadata.get("data"), metadata.get("dataset_digest")
        if not data:
            raise UserError(f"{model} does not record its data: add -P data=... with the data that it was trained on")
        try:
            dataset = self(recorded(data))
        except (UserError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            mend = "" if "-P data=" in str(error) else ": add -P data=... with data that can be read"
            raise UserError(f"the data of {model} cannot be read: {kind}{error}{mend}") from None
        if check_digest and dataset.digest != digest:
            raise UserError(
                f"the data of {model} have changed: their digest was {digest} and is {dataset.digest}: "
                "add -P data=... to take them as they are now"
            )
        return dataset


def recorded(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data group that a model records, after a check of the loader that it names: anybody can write a model's metadata.

    UserError for a loader that is neither a function of project/ nor read_table.
    """
    target = str(data.get("_target_"))
    try:
        loader = pkgutil.resolve_name(target) if target.startswith(("project.", "alacarte.data.tables.")) else None
    except (ImportError, AttributeError, ValueError):
        loader = None
    module = str(getattr(loader, "__module__", None))
    if not inspect.isfunction(loader) or not (module.startswith("project.") or module == "alacarte.data.tables"):
        raise UserError(
            f"the model names data._target_={target}, which is no function of project/: add -P data=... instead"
        )
    return dict(data)


def _call_loader(_target_: str, arguments: Mapping[str, Any]) -> tuple[pd.DataFrame, str]:
    """The loader's rows, their column names distinct strings, and where they come from."""
    try:
        loader = pkgutil.resolve_name(_target_)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"data._target_={_target_}: {error}: give the dotted name of a function") from None
    try:
        inspect.signature(loader).bind(**arguments)
    except TypeError as error:
        allowed = ", ".join(inspect.signature(loader).parameters)
        raise UserError(f"data: {_target_} takes {allowed or 'no keys'}: {error}") from None
    frame = loader(**arguments)
    if not isinstance(frame, pd.DataFrame):
        raise UserError(f"data._target_={_target_} returns {type(frame).__name__}: return one pandas DataFrame")
    path = arguments.get("path")
    source = frame.attrs.get("source") or (tables.absolute(str(path)) if path else _target_)
    frame = frame.set_axis(frame.columns.map(str), axis="columns")
    if twice := sorted(set(frame.columns[frame.columns.duplicated()])):
        raise UserError(f"{source} has more than one column {', '.join(twice)}: rename them")
    if frame.empty:
        raise UserError(f"{source} has {len(frame.columns)} columns and {len(frame)} rows: give it rows to learn from")
    return frame, source


def source_digest(
    *,
    _target_: str,
    name: str | None = None,
    target: str | None = None,
    task: str | None = None,
    key: str | None = None,
    drop: Sequence[str] = (),
    split: Mapping[str, Any] | None = None,
    **loader_arguments: Any,
) -> str:
    """SHA-256 that tells whether the source has changed, without parsing it. Takes what `load_data` takes.

    With a `path`, the hash of the bytes there (`tables.path_digest`). Without, that of the loader's name, its arguments and
    the versions of pandas and scikit-learn: such a loader is taken to return the same rows for the same arguments.
    """
    if path := loader_arguments.get("path"):
        return tables.path_digest(str(path))
    versions = [importlib.metadata.version(package) for package in ("pandas", "scikit-learn")]
    text = json.dumps([_target_, loader_arguments, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def as_mlflow(dataset: Dataset, part: str, predictions: np.ndarray | None = None) -> "PandasDataset":
    """One part for `mlflow.log_input`, or with a model's predictions for `mlflow.models.evaluate`; the digest is the whole's.

    It is named `<name>_<part>`, because MLflow keeps one record for each name and digest, with the first's row count. A
    source that MLflow has no class for (memory://, hf://, a loader's name) is recorded as code, by its name.
    """
    from mlflow.data.pandas_dataset import PandasDataset

    assert part in PARTS, part
    table = pd.concat([dataset.X, dataset.y], axis="columns")
    # The schema says type and whether values are missing: a present and a missing row of each column tell, in no time.
    present = table.notna().to_numpy()
    telling = sorted({*present.argmax(axis=0), *present.argmin(axis=0)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two classes for local files, and a hint on integers that is for models
        source = _source(dataset.source)
        schema = PandasDataset(table.iloc[telling], source, digest=dataset.digest).schema
    rows = table[dataset.split == part]
    answered = None
    if predictions is not None:
        answered = f"predicted {dataset.target}"
        rows = rows.assign(**{answered: predictions})
    logged = PandasDataset(rows, source, dataset.target, f"{dataset.name}_{part}", dataset.digest, answered)
    vars(logged)["schema"] = schema  # where its cached property keeps it
    return logged


def table_as_mlflow(frame: pd.DataFrame, path: str, digest: str) -> "PandasDataset":
    """A table read from `path`, whose SHA-256 is `digest`, for `mlflow.log_input`."""
    from mlflow.data.pandas_dataset import PandasDataset

    name = PurePath(tables.SUFFIX.split(str(path))[0]).name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PandasDataset(frame, _source(tables.absolute(str(path))), name=name, digest=digest[:16])


def _source(place: str) -> "DatasetSource":
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.exceptions import MlflowException

    if "/" in place:
        with contextlib.suppress(MlflowException):
            return resolve_dataset_source(place)
    return CodeDatasetSource({"mlflow.source.name": place})


# --- the task --------------------------------------------------------------------------------------------------------


def _input(column: pd.Series) -> pd.Series:
    plain = tables.plain_column(column)
    if plain.dtype.kind == "f" and (infinite := np.isinf(plain)).any():
        logger.warning("column %r: %d infinite values count as missing", column.name, infinite.sum())
        plain = plain.mask(infinite)
    if plain.isna().all():
        raise UserError(
            f"column {column.name!r} has no value in any of {len(plain)} rows: leave it out with data.drop=['{column.name}']"
        )
    return plain


def _target(column: pd.Series, task: str) -> tuple[pd.Series, str]:
    """Labels or numbers, and the task, by the rule in `load_data`. The column has no missing value."""
    setting = f"data.target={column.name}"
    categories = isinstance(column.dtype, pd.CategoricalDtype)
    y = tables.plain_column(column.astype(column.dtype.categories.dtype) if categories else column)
    if y.dtype.kind == "M":
        raise UserError(f"{setting} holds dates: name a column of classes or numbers")
    if y.dtype.kind == "f" and (infinite := int(np.isinf(y).sum())):
        raise UserError(f"{setting}: {infinite} of {len(y)} rows are infinite: mend or remove them")
    if y.nunique() < 2:
        raise UserError(f"{setting}: all {len(y)} rows hold {y.iloc[0]}: there must be two different values")
    number = y.dtype.kind in "if"
    fractions = y[(y % 1 != 0) | (y.abs() >= 2**53)] if y.dtype.kind == "f" else y.iloc[:0]  # no class is that large
    if task == "auto":
        few = number and fractions.empty and y.nunique() <= min(MOST_INTEGER_CLASSES, len(y) / 5)
        task = "classification" if few or categories or not number else "regression"
    if task == "regression":
        values = pd.to_numeric(y, errors="coerce").astype("float64")
        if len(text := y[values.isna()]):
            raise UserError(
                f"data.task=regression: {setting} is no number in {len(text)} of {len(y)} rows, such as {text.iloc[0]!r}: "
                "mend or remove them, or use data.task=classification"
            )
        return values, task
    if len(fractions):
        raise UserError(
            f"data.task=classification: {setting} holds fractions, such as {fractions.iloc[0]}: use data.task=regression, "
            "or write the classes as text"
        )
    return y.astype("int64") if number else y, task
