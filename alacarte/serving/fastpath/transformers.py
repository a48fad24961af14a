"""A fitted pipeline as a few numpy calls, without the frames, checks and copies between its steps.

It does the arithmetic of scikit-learn in the same order, so answers agree to the last bits. `compile_model` raises NotKnown
for a step that is not known here, and its function raises ValueError for rows that only the model itself can judge (infinite
numbers, categories that the model refuses). The caller then asks the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler

from alacarte.serving.fastpath.categories import make_lookups
from alacarte.serving.fastpath.estimators import (
    Labels,
    NotKnown,
    compile_estimator,
    compile_torch,
    finite,
    is_sklearn,
    without_names,
)

# (n, d) float64, or d object arrays (n,) of plain Python values in which None is missing.
Inputs = np.ndarray | list[np.ndarray]
# From inputs to (n, k) float64. Never writes into the inputs.
Transform = Callable[[Inputs], np.ndarray]
Predict = Callable[[Inputs], Labels]

# The names of the types that columns are cast to.
TEXT, DATE = np.dtype(str).name, "datetime64[us]"


@dataclass(frozen=True)
class Columns:
    """Columns of the inputs before a step makes numbers of them."""

    at: tuple[int, ...]  # their places in the signature
    names: tuple[str, ...]
    numeric: bool  # the inputs are one float64 array
    fill: tuple | None = None  # the value that replaces the missing values of each; None: no step has filled them
    cast: str = ""  # TEXT or DATE, once a step has cast them

    def of(self, inputs: Inputs, i: int) -> np.ndarray:
        return inputs[:, self.at[i]] if self.numeric else inputs[self.at[i]]  # type: ignore[call-overload]


Block = Columns | Transform


def compile_model(kind: str, model: Any, names: list[str], numeric: bool) -> Predict:
    """The predict of a fitted scikit-learn estimator or Pipeline ("sklearn"), or of one of our networks ("torch").

    Labels are those of the model: class names, or float64. Raises NotKnown, or any error for a model of another version.
    """
    block = Columns(tuple(range(len(names))), tuple(names), numeric)
    if kind == "torch":
        return _chain(_numbers(_step(model.preprocess, block)), compile_torch(model))
    return _model(model, block)


def _chain(numbers: Transform, predict: Callable[[np.ndarray], Labels]) -> Predict:
    return lambda inputs: predict(numbers(inputs))


def _model(model: Any, block: Block) -> Predict:
    if type(model) is Pipeline:
        for _, step in model.steps[:-1]:
            block = _step(step, block)
        return _model(model.steps[-1][1], block)
    if hasattr(model, "best_estimator_"):  # a search over settings
        return _model(model.best_estimator_, block)
    if type(model) is TransformedTargetRegressor and model._training_dim == 1 and is_sklearn(model.transformer_):
        target, scaled = model.transformer_, _model(model.regressor_, block)
        return lambda inputs: (target.inverse_transform(scaled(inputs)[0].reshape(-1, 1)).reshape(-1), None)
    return _chain(_numbers(block, model), compile_estimator(model))


# --- from columns to numbers ---


def _step(step: Any, block: Block) -> Block:
    """The output of `step` for the input `block`."""
    if step is None or isinstance(step, str):  # "passthrough"
        return block
    if type(step) is Pipeline:
        for _, part in step.steps:
            block = _step(part, block)
        return block
    if type(step) is ColumnTransformer:
        return _column_transformer(step, block)
    if isinstance(block, Columns):
        _check_names(step, block)
        if type(step) is FunctionTransformer and not isinstance(step.func, np.ufunc):
            return _cast(step, block)
        if type(step) is SimpleImputer and step.missing_values is pd.NA:
            return _fill(step, block)
        if type(step) in (OneHotEncoder, OrdinalEncoder):
            return _encode(step, block)
    numbers = _numbers(block, step)
    if type(step) is SimpleImputer:
        return _impute(step, numbers)
    if type(step) is StandardScaler and step.with_mean and step.with_std:
        mean, scale = step.mean_, step.scale_
        return lambda inputs: (numbers(inputs) - mean) / scale
    if is_sklearn(step):
        plain = without_names(step)
        return lambda inputs: _dense(plain.transform(numbers(inputs)))
    raise NotKnown(type(step).__name__)


def _dense(values: Any) -> np.ndarray:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype="float64")


def _check_names(part: Any, columns: Columns) -> None:
    # scikit-learn refuses a frame in another order
    if tuple(getattr(part, "feature_names_in_", columns.names)) != columns.names:
        raise NotKnown(f"{type(part).__name__} was fitted on other columns")


def _numbers(block: Block, part: Any = None) -> Transform:
    """`block` as float64, the input of `part`."""
    if not isinstance(block, Columns):
        return block
    _check_names(part, block)
    columns = block
    if columns.cast == DATE and columns.fill:
        return partial(_dates, columns, columns.fill)
    if columns.cast:
        raise NotKnown("text where numbers are needed")
    places = list(columns.at)
    numbers: Transform = partial(_floats, columns)
    if columns.numeric:
        span = slice(places[0], places[-1] + 1)  # a view, where the columns are neighbours
        chosen: Any = span if places == list(range(span.start, span.stop)) else places
        numbers = lambda inputs: inputs[:, chosen]  # type: ignore[call-overload]  # noqa: E731
    fill = np.asarray(columns.fill or np.nan, dtype="float64")
    return numbers if np.isnan(fill).all() else lambda inputs: _filled(numbers(inputs), fill)


def _floats(columns: Columns, inputs: Inputs) -> np.ndarray:
    out = np.empty((len(inputs[0]), len(columns.at)), order="F")  # like a frame, which can decide the last bit
    for i in range(len(columns.at)):
        out[:, i] = columns.of(inputs, i)  # None becomes nan
    return out


def _dates(columns: Columns, fills: tuple, inputs: Inputs) -> np.ndarray:
    """As numpy counts them, in the unit of the cast; through objects, as in the model."""
    out = np.empty((len(inputs[0]), len(columns.at)))
    for i, fill in enumerate(fills):
        values = [fill if value is None or value != value else value for value in columns.of(inputs, i)]
        out[:, i] = np.array(values, dtype=object).astype(columns.cast).astype("float64")
    return out


def _filled(x: np.ndarray, fill: np.ndarray) -> np.ndarray:
    missing = np.isnan(x)
    return np.where(missing, fill, x) if missing.any() else x


def _column_transformer(step: ColumnTransformer, block: Block) -> Transform:
    if not isinstance(block, Columns) or block.fill is not None or block.cast or step.transformer_weights:
        raise NotKnown("a ColumnTransformer over columns that another step has changed")
    fitted_on = list(getattr(step, "feature_names_in_", block.names))
    if len(fitted_on) != step.n_features_in_:
        raise NotKnown("a ColumnTransformer over another number of columns")
    parts = []
    for name, transformer, chosen in step.transformers_:
        names = [fitted_on[i] for i in step._transformer_to_input_indices[name]]
        if not names or (isinstance(transformer, str) and transformer == "drop"):
            continue
        if isinstance(chosen, str | int):
            raise NotKnown("a transformer of one column, which it gets in one dimension")
        at = tuple(block.at[block.names.index(each)] for each in names)
        parts.append(_numbers(_step(transformer, replace(block, at=at, names=tuple(names)))))
    return parts[0] if len(parts) == 1 else lambda inputs: np.concatenate([part(inputs) for part in parts], axis=1)


def _cast(step: FunctionTransformer, columns: Columns) -> Block:
    if step.func is None:  # "passthrough", fitted
        return columns
    if step.func is not np.asarray or list(step.kw_args or {}) != ["dtype"]:
        raise NotKnown(f"FunctionTransformer({step.func}) of columns")
    dtype = np.dtype(step.kw_args["dtype"])
    if dtype == np.float64:
        return _numbers(columns)
    if columns.cast or (dtype.kind != "O" and (not columns.fill or dtype.name not in (TEXT, DATE))):
        raise NotKnown(f"a cast to {dtype.name}")
    return columns if dtype.kind == "O" else replace(columns, cast=dtype.name)


def _fill(step: SimpleImputer, columns: Columns) -> Columns:
    """An imputer for which pandas.NA stands for any marker of a missing value."""
    if columns.fill is not None or columns.cast or step.indicator_ is not None:
        raise NotKnown("an imputer of columns that another step has filled")
    if not step.keep_empty_features and pd.isna(step.statistics_).any():
        raise NotKnown("an imputer that drops columns")
    return replace(columns, fill=tuple(step.statistics_))


def _impute(step: SimpleImputer, numbers: Transform) -> Transform:
    fill, marker = step.statistics_.astype("float64"), step.missing_values
    if not isinstance(marker, int | float) or (np.isnan(fill).any() and not step.keep_empty_features):
        raise NotKnown(f"SimpleImputer(missing_values={marker}) of numbers, or one that drops columns")
    flagged = None if step.indicator_ is None or not len(step.indicator_.features_) else step.indicator_.features_

    def impute(inputs: Inputs) -> np.ndarray:
        x = numbers(inputs)
        missing = np.isnan(x) if math.isnan(marker) else finite(x) == marker
        if missing.any():
            x = np.where(missing, fill, x)
        return x if flagged is None else np.concatenate([x, missing[:, flagged]], axis=1)

    return impute


def _encode(encoder: Any, columns: Columns) -> Transform:
    if columns.cast == DATE:
        raise NotKnown("categories of dates")
    lookups = list(enumerate(make_lookups(encoder, columns.fill, columns.cast == TEXT)))
    return lambda inputs: np.concatenate([each.encode(columns.of(inputs, i).tolist()) for i, each in lookups], axis=1)
