"""Convert the columns of a table to numbers, in the same way for every model family, as a part of the saved model.

It uses only parts of scikit-learn and numpy, so that skops loads it anywhere without our code. None, nan, NaT and pandas.NA all
mean missing. Unseen categories are no error. Missing values are no error, also if training had none.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from threadpoolctl import threadpool_limits

from alacarte.errors import UserError

# numpy says so of each date with a time zone; it reads them as UTC, which is what is meant here.
warnings.filterwarnings("ignore", message="no explicit representation of timezones")

# A text column counts as dates when every value looks like this and numpy can read it.
ISO_DATE = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?"

# The categories that one text column can spread over; the rarest share the last one.
MAX_CATEGORIES = 50

# Cells of a table below which one thread trains as fast as two: measured with boosted trees and small networks.
SMALL = 1_000_000

# Standard deviations of training beyond which the spread of a column makes `widen` scale it anew.
WIDE = 4.0

# What numpy's NaT, the missing date, is as a float.
NO_DATE = float(np.iinfo(np.int64).min)


def fit_preprocess(X: pd.DataFrame) -> ColumnTransformer:
    """Learn the way from the columns of X (n rows) to a float64 array (n, n_features)."""
    if X.shape[1] == 0:
        raise UserError("data: no input column is left beside the target; allowed is one or more")
    kinds = {name: _kind(X[name]) for name in X.columns}
    steps = {"numeric": _numeric(), "text": _text(), "date": _date()}
    groups = [(kind, pipe, [name for name in X if kinds[name] == kind]) for kind, pipe in steps.items()]
    # dense: the families that take no sparse array would fail on a wide one-hot
    preprocess = ColumnTransformer([group for group in groups if group[2]], sparse_threshold=0)
    with rows_fit(X):
        return preprocess.fit(X)


def widen(preprocess: ColumnTransformer, X: pd.DataFrame) -> None:
    """Scale columns anew that vary far more in X than they did in training; all others stay as they are.

    A pixel that was always blank and now is not comes in at fifty standard deviations: it drowns the other columns, and
    few steps of a gradient cannot mend that. Where a column hardly varied, hardly anything was learned from its scale.
    """
    for kind, pipe, names in preprocess.transformers_:
        if kind in ("numeric", "date"):
            spread = pipe.transform(X[names]).std(axis=0)
            pipe[-1].scale_[spread > WIDE] *= spread[spread > WIDE]


def signature(preprocess: ColumnTransformer | None, example: pd.DataFrame, classes: list | None) -> ModelSignature:
    """The MLflow signature of a model that takes the columns of `example` and answers with `classes` or a float.

    `preprocess` knows what each column was in training; without one the example has to tell. Integer, bool and category
    columns are AnyType: `double` refuses an int64 frame, `long` refuses a missing value, and over JSON `boolean` turns a
    missing value into False without a word.
    """
    groups = preprocess.transformers if preprocess else []
    kinds = {name: kind for kind, _, names in groups for name in names}
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(_column_type(column.dtype, kinds.get(name) or _kind(column)), name) for name, column in example.items()
    ]
    by_type = {bool: DataType.boolean, int: DataType.long, str: DataType.string}
    output = by_type.get(type(classes[0]), DataType.double) if classes else DataType.double
    return ModelSignature(Schema(inputs), Schema([ColSpec(output)]))


def labels(y: pd.Series) -> np.ndarray:
    """(n,) labels as numpy's own str, int or bool, whatever pandas holds them in."""
    return np.asarray(y.tolist())


def requirements(*packages: str) -> list[str]:
    """Exact pins of what is installed. A local build such as 2.13.0+cpu is pinned as 2.13.0, which an index has."""
    names = ["mlflow", "scikit-learn", "skops", "numpy", "pandas", *packages]
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


def threads_for(X: pd.DataFrame) -> AbstractContextManager:
    """One thread while a small table trains: more wait for each other, 10 to 40 times longer on a busy machine."""
    return threadpool_limits(1 if X.size < SMALL else None)


@contextmanager
def rows_fit(X: pd.DataFrame) -> Iterator[None]:
    """Turn an error of scikit-learn or numpy about a value in X into a UserError of one line that names the column."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        if value := re.search(r"string to float: '(.*)'|datetime string \"(.*)\" at", reason):
            text = value[1] or value[2]
            names = [repr(name) for name, column in X.items() if (column.astype(str) == text).any()]
            wanted = "numbers" if value[1] else "dates"
            raise UserError(
                f"data: column {' or '.join(names)} holds {text!r}, but the model needs {wanted}"
            ) from error
        raise UserError(f"data: the rows do not fit the model: {reason}") from error


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
    kinds = {
        "numeric": {"integer", "floating", "boolean", "mixed-integer-float", "decimal"},
        "text": {"mixed-integer"},
        "date": {"datetime64", "datetime", "date"},
    }
    for kind, names in kinds.items():
        if inferred in names:
            return kind
    if inferred == "empty":  # nothing but missing values in this part of the data
        numeric, date = pd.api.types.is_numeric_dtype(dtype), pd.api.types.is_datetime64_any_dtype(dtype)
        return "numeric" if numeric else "date" if date else "text"
    raise UserError(
        f"data: column {column.name!r} holds {inferred} ({dtype}); allowed are numbers, bool, dates and text"
    )


def _are_dates(values: pd.Series) -> bool:
    if not values.str.fullmatch(ISO_DATE).all():
        return False
    try:
        np.asarray(values, dtype="datetime64[us]")
    except ValueError:
        return False
    return True


def _column_type(dtype: Any, kind: str) -> DataType | AnyType:
    if kind == "numeric" and pd.api.types.is_float_dtype(dtype):
        return DataType.double
    if isinstance(dtype, pd.StringDtype) or (kind == "text" and pd.api.types.is_object_dtype(dtype)):
        return DataType.string
    if kind == "date" and not isinstance(dtype, pd.DatetimeTZDtype):  # MLflow refuses time zones as datetime
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


def _text() -> Pipeline:
    one_hot = OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=MAX_CATEGORIES, sparse_output=False)
    return make_pipeline(*_missing_as("(missing)"), _cast("str"), one_hot)


def _date() -> Pipeline:
    # Microseconds since 1970: in nanoseconds a far date such as 9999-12-31 overflows.
    fill = SimpleImputer(missing_values=NO_DATE, strategy="median", add_indicator=True, keep_empty_features=True)
    return make_pipeline(*_missing_as("NaT"), _cast("datetime64[us]"), _cast("float64"), fill, StandardScaler())
