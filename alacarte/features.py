"""From the columns of a table to the inputs of a model: `features=tabular`, `features=none` and features of your own.

The fitted transformer is a part of every saved model. `features=tabular` uses only parts of scikit-learn and numpy, so that
skops loads it anywhere without our code. There None, nan, NaT and pandas.NA all mean missing, and neither an unseen category
nor a missing value is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType
from scipy.sparse import issparse
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits

from alacarte import formats
from alacarte.errors import UserError
from alacarte.own_code import check_inputs, describe, rows_fit

# numpy warns about each date with a time zone. It reads such dates as UTC, which is intended here.
warnings.filterwarnings("ignore", message="no explicit representation of timezones")

# A text column counts as dates when every value looks like this and numpy can read it.
ISO_DATE = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?"

# What pandas infers from the values of a column.
KINDS = {
    **dict.fromkeys(("integer", "floating", "boolean", "mixed-integer-float", "decimal"), "numeric"),
    **dict.fromkeys(("datetime64", "datetime", "date"), "date"),
    "mixed-integer": "text",
}

# Cells of a table below which one thread trains as fast as two: measured with boosted trees and small networks.
SMALL = 1_000_000

# Standard deviations of training beyond which the spread of a column makes `widen` scale it anew.
WIDE = 4.0

# What numpy's NaT, the missing date, is as a float.
NO_DATE = float(np.iinfo(np.int64).min)


class Features(Protocol):
    """What `features=NAME` selects, not fitted yet."""

    def fit_transform(self, X: pd.DataFrame, y: pd.Series, seed: int = 0) -> tuple[Any, Any]:
        """The transformer, fitted on the training rows, and the inputs of the model. None: the columns are the inputs."""


@dataclass(frozen=True)
class Tabular:
    """`features=tabular`: numbers are scaled, texts become one column per category, dates become numbers."""

    max_categories: int = 50
    text: tuple[str, ...] = ()  # columns that are text, also where each value is a date

    def fit_transform(
        self, X: pd.DataFrame, y: pd.Series | None = None, seed: int = 0
    ) -> tuple[ColumnTransformer, Any]:
        """A transformer to a dense float64 array (n, n_features)."""
        kinds = {name: "text" if name in self.text else _kind(X[name]) for name in X.columns}
        steps = {"numeric": _numeric(), "text": _text(self.max_categories), "date": _date()}
        groups = [(kind, pipe, [name for name in X if kinds[name] == kind]) for kind, pipe in steps.items()]
        transformer = ColumnTransformer([group for group in groups if group[2]], sparse_threshold=0)
        with rows_fit(X):
            return transformer, transformer.fit_transform(X)


@dataclass(frozen=True)
class NoFeatures:
    """`features=none`: the model gets the original columns."""

    def fit_transform(self, X: pd.DataFrame, y: pd.Series | None = None, seed: int = 0) -> tuple[None, pd.DataFrame]:
        return None, X


@dataclass(frozen=True)
class OwnFeatures:
    """The transformer that a function of the team made. `function` names it in error messages."""

    function: str
    transformer: Any

    def fit_transform(self, X: pd.DataFrame, y: pd.Series, seed: int = 0) -> tuple[Any, Any]:
        set_seed(self.transformer, seed, unseeded_only=True)
        with rows_fit(X, self.function):
            inputs = self.transformer.fit_transform(X, labels(y))
        check_inputs(inputs, X, self.transformer, self.function)
        try:
            formats.save_skops(self.transformer, BytesIO())  # before hours of training
        except UserError as error:
            raise UserError(f"{self.function}: the transformer cannot be saved: {error}") from error
        return self.transformer, inputs


TABULAR = Tabular()


def make_features(target: str, made: Any, text: Sequence[str] = ()) -> Features:
    """The features of a configuration, whose function `target` has returned `made`. `text` are the columns of data.text."""
    if isinstance(made, Tabular):
        return replace(made, text=tuple(text))
    if isinstance(made, NoFeatures):
        return made
    if isinstance(made, type) or not (hasattr(made, "fit_transform") and hasattr(made, "transform")):
        raise UserError(
            f"features._target_={target} returns {type(made).__name__}: return a scikit-learn transformer, which has"
            " fit_transform and transform (a class gets both from BaseEstimator and TransformerMixin)"
        )
    return OwnFeatures(target, made)


def unfitted(transformer: Any) -> Features:
    """The features with which a fitted transformer can be fitted again."""
    if transformer is None:
        return NoFeatures()
    if not is_tabular(transformer):
        return OwnFeatures(describe(transformer), clone(transformer))
    text = next(((pipe, names) for name, pipe, names in transformer.transformers if name == "text"), None)
    return Tabular(text[0][-1].max_categories, tuple(text[1])) if text else TABULAR


def transform(transformer: Any, X: pd.DataFrame) -> Any:
    """The inputs of a model for the rows of X."""
    if transformer is None:
        return X
    with rows_fit(X):
        inputs = transformer.transform(X)
    if not is_tabular(transformer):
        check_inputs(inputs, X, transformer)
    return inputs


def to_numbers(inputs: Any, dtype: str = "float32") -> np.ndarray:
    """Inputs as a dense array, for models that take nothing else. UserError for texts and dates."""
    dense = inputs.toarray() if issparse(inputs) else inputs
    try:
        return np.asarray(dense, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise UserError(f"features: this model needs numbers: {error}; use features=tabular") from error


def is_tabular(transformer: Any) -> bool:
    """Whether `Tabular` made a transformer."""
    groups = getattr(transformer, "transformers", ()) if type(transformer) is ColumnTransformer else ()
    kinds = {"numeric": StandardScaler, "text": OneHotEncoder, "date": StandardScaler}
    return bool(groups) and all(
        isinstance(pipe, Pipeline) and type(pipe[-1]) is kinds.get(kind) for kind, pipe, _ in groups
    )


def set_seed(estimator: Any, seed: int, *, unseeded_only: bool = False) -> None:
    """Set each random_state of an estimator or transformer."""
    params = estimator.get_params() if hasattr(estimator, "get_params") else {}
    states = {key: value for key, value in params.items() if key.split("__")[-1] == "random_state"}
    if chosen := {key: seed for key, value in states.items() if value is None or not unseeded_only}:
        estimator.set_params(**chosen)


def widen(transformer: Any, X: pd.DataFrame) -> None:
    """Scale columns of `Tabular` again that vary far more in X than they did in training. Nothing else changes.

    A pixel that was always blank in training and now is not would arrive at fifty standard deviations, and would hide the
    other columns. The model has learned little from the scale of a column that hardly varied, so a new scale costs little.
    """
    for kind, pipe, names in transformer.transformers_ if is_tabular(transformer) else ():
        if kind in ("numeric", "date"):
            spread = pipe.transform(X[names]).std(axis=0)
            pipe[-1].scale_[spread > WIDE] *= spread[spread > WIDE]


def signature(transformer: Any, example: pd.DataFrame, classes: list | None) -> ModelSignature:
    """The MLflow signature of a model that takes the columns of `example` and answers with `classes` or a float.

    `Tabular` knows what each column was in training. For other features the type of the column decides.
    Integer, bool and category columns are AnyType: `double` refuses an int64 frame, `long` refuses a missing value, and over
    JSON `boolean` silently turns a missing value into False.
    """
    kinds: Mapping[str, str] = {}
    if is_tabular(transformer):
        kinds = {name: kind for kind, _, names in transformer.transformers for name in names}
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(_column_type(column.dtype, kinds.get(str(name))), name) for name, column in example.items()
    ]
    by_type = {bool: DataType.boolean, int: DataType.long, str: DataType.string}
    output = by_type.get(type(classes[0]), DataType.double) if classes else DataType.double
    return ModelSignature(Schema(inputs), Schema([ColSpec(output)]))


def labels(y: pd.Series) -> np.ndarray:
    """(n,) labels as numpy's own str, int or bool, whatever pandas holds them in."""
    return np.asarray(y.tolist())


def requirements(*packages: str) -> list[str]:
    """Exact pins of what is installed. A local build such as 2.13.0+cpu is pinned as 2.13.0, which an index has."""
    names = ["mlflow", "scikit-learn", "skops", "numpy", "pandas", "scipy", *packages]
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


def threads_for(X: pd.DataFrame) -> AbstractContextManager:
    """One thread while a small table trains: more wait for each other, 10 to 40 times longer on a busy machine."""
    return threadpool_limits(1 if X.size < SMALL else None)


def _kind(column: pd.Series) -> str:
    """ "numeric", "text" or "date"."""
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        # pandas turns 1 into 1.0 when such a column has a missing value, so as text it would not match itself
        return "numeric" if pd.api.types.is_numeric_dtype(dtype.categories.dtype) else "text"
    values = column.dropna()
    inferred = pd.api.types.infer_dtype(values, skipna=True)
    if inferred == "string":
        return "date" if _are_dates(values) else "text"
    if inferred == "empty":  # nothing but missing values in this part of the data
        numeric, date = pd.api.types.is_numeric_dtype(dtype), pd.api.types.is_datetime64_any_dtype(dtype)
        return "numeric" if numeric else "date" if date else "text"
    if inferred not in KINDS:
        raise UserError(
            f"data: column {column.name!r} holds {inferred} ({dtype}); allowed are numbers, bool, dates and text"
        )
    return KINDS[inferred]


def _are_dates(values: pd.Series) -> bool:
    if not values.str.fullmatch(ISO_DATE).all():
        return False
    try:
        np.asarray(values, dtype="datetime64[us]")
    except ValueError:
        return False
    return True


def _column_type(dtype: Any, kind: str | None) -> DataType | AnyType:
    """`kind` is that of a column of `Tabular`, or None."""
    if kind in ("numeric", None) and pd.api.types.is_float_dtype(dtype):
        return DataType.double
    if isinstance(dtype, pd.StringDtype) or (kind == "text" and pd.api.types.is_object_dtype(dtype)):
        return DataType.string
    dates = kind == "date" or (kind is None and pd.api.types.is_datetime64_dtype(dtype))
    if dates and not isinstance(dtype, pd.DatetimeTZDtype):  # MLflow refuses time zones as datetime
        return DataType.datetime
    return AnyType()


def _cast(dtype: str) -> FunctionTransformer:
    return FunctionTransformer(np.asarray, kw_args={"dtype": dtype})


def _missing_as(value: object) -> list:
    # Only over an object array does SimpleImputer know every marker of a missing value.
    fill = SimpleImputer(missing_values=pd.NA, strategy="constant", fill_value=value, keep_empty_features=True)
    return [_cast("object"), fill]


def _numeric() -> Pipeline:
    fill = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    return make_pipeline(*_missing_as(np.nan), fill, StandardScaler())


def _text(max_categories: int) -> Pipeline:
    one_hot = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=max_categories, sparse_output=False)
    return make_pipeline(*_missing_as("(missing)"), _cast("str"), one_hot)


def _date() -> Pipeline:
    # Microseconds since 1970: in nanoseconds a far date such as 9999-12-31 overflows.
    fill = SimpleImputer(missing_values=NO_DATE, strategy="median", add_indicator=True, keep_empty_features=True)
    return make_pipeline(*_missing_as("NaT"), _cast("datetime64[us]"), _cast("float64"), fill, StandardScaler())
