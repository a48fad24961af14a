"""The fast path: a fitted pipeline as a few numpy calls, without the frames, checks and copies around them.

It does the arithmetic of scikit-learn in the same order, so answers agree to the last bits, and values at the threshold
of a tree fall to the same side. It does not know every part and every value, and says so: `build` gives None for a
structure it does not know, and what it makes raises, on any thread and without a trace, for rows that only the model
itself can judge (infinite numbers, categories that the model refuses, ...). Whoever calls it then asks the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.impute import SimpleImputer
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler

from alacarte.serving.fastpath.categories import UNSURE, lookups
from alacarte.serving.fastpath.estimators import (
    Answer,
    NotKnown,
    finite,
    is_sklearn,
    make_head,
    make_torch_head,
    nameless,
)

if TYPE_CHECKING:
    from alacarte.formats.torch_network import TorchNetwork

# (n, d) float64, or d object arrays (n,) of plain Python values in which None is missing.
Rows = np.ndarray | list[np.ndarray]
# From rows to (n, k) float64. Never writes into the rows.
Numbers = Callable[[Rows], np.ndarray]
Answers = Callable[[Rows], Answer]

log = logging.getLogger(__name__)

# The names of what columns are cast to.
TEXT, DATE = np.dtype(str).name, "datetime64[us]"

# What transform does: how, with which fitted attribute, and with which setting if not always.
SCALERS = {
    "StandardScaler": ((np.subtract, "mean_", "with_mean"), (np.divide, "scale_", "with_std")),
    "MinMaxScaler": ((np.multiply, "scale_", ""), (np.add, "min_", "")),
    "MaxAbsScaler": ((np.divide, "scale_", ""),),
    "RobustScaler": ((np.subtract, "center_", "with_centering"), (np.divide, "scale_", "with_scaling")),
}


@dataclass(frozen=True)
class Columns:
    """Columns as they came, on their way to numbers."""

    at: tuple[int, ...]  # their places in the signature
    names: tuple[str, ...]
    numeric: bool  # the rows are one float64 array
    fill: tuple | None = None  # what stands for the missing values of each; None: nothing yet
    cast: str = ""  # TEXT or DATE, once a step has cast them

    def of(self, rows: Rows, i: int) -> np.ndarray:
        return rows[:, self.at[i]] if self.numeric else rows[self.at[i]]  # type: ignore[call-overload]


Block = Columns | Numbers


def build(estimator: Any, columns: list[str], numeric: bool) -> Answers | None:
    """The predict of a fitted scikit-learn estimator or Pipeline that a signature with `columns` feeds.

    Labels are those of estimator.predict: class names, or float64.
    """
    return _or_none(lambda: _answers(estimator, _columns(columns, numeric)), type(estimator).__name__)


def build_torch(predictor: TorchNetwork, columns: list[str], numeric: bool) -> Answers | None:
    """The predict of one of our torch models."""

    def make() -> Answers:
        numbers = _numbers(_transform(predictor.preprocess, _columns(columns, numeric)))
        head = make_torch_head(predictor)
        return lambda rows: head(numbers(rows))

    return _or_none(make, "a torch model")


def _or_none(make: Callable[[], Answers], name: str) -> Answers | None:
    try:
        return make()
    except Exception as error:  # a model of another version may lack any attribute; it then is served as it is
        log.debug("%s is not compiled: %s: %s", name, type(error).__name__, error)
        return None


def _columns(names: list[str], numeric: bool) -> Columns:
    return Columns(tuple(range(len(names))), tuple(names), numeric)


def _answers(model: Any, block: Block) -> Answers:
    if type(model) is Pipeline:
        for _, step in model.steps[:-1]:
            block = _transform(step, block)
        return _answers(model.steps[-1][1], block)
    if hasattr(model, "best_estimator_"):  # a search over settings
        return _answers(model.best_estimator_, block)
    if type(model) is TransformedTargetRegressor and model._training_dim == 1:
        return _in_unit_of_target(model.transformer_, _answers(model.regressor_, block))
    numbers, head = _numbers(block, model), make_head(model)
    return lambda rows: head(numbers(rows))


def _in_unit_of_target(transformer: Any, answers: Answers) -> Answers:
    if type(transformer) is StandardScaler and transformer.with_mean and transformer.with_std:
        scale, mean = transformer.scale_, transformer.mean_
        return lambda rows: (answers(rows)[0] * scale + mean, None)
    if not is_sklearn(transformer):
        raise NotKnown(type(transformer).__name__)
    return lambda rows: (transformer.inverse_transform(answers(rows)[0].reshape(-1, 1)).reshape(-1), None)


# --- from columns to numbers ---


def _transform(step: Any, block: Block) -> Block:
    """What leaves `step` when `block` enters it."""
    if step is None or isinstance(step, str):  # "passthrough"
        return block
    if type(step) is Pipeline:
        for _, part in step.steps:
            block = _transform(part, block)
        return block
    if type(step) is ColumnTransformer:
        return _column_transformer(step, block)
    if type(step) is FeatureUnion and not step.transformer_weights:
        return _side_by_side([_numbers(_transform(part, block)) for _, part in step.transformer_list if part != "drop"])
    if type(step) is FunctionTransformer:
        return _function(step, block)
    if isinstance(block, Columns):
        _check_names(step, block)
        if type(step) is SimpleImputer and (step.missing_values is pd.NA or any(map(_is_text, step.statistics_))):
            return _fill(step, block)
        if type(step) in (OneHotEncoder, OrdinalEncoder):
            return _encode(step, block)
    numbers = _numbers(block, step)
    if type(step) is SimpleImputer:
        return _impute(step, numbers)
    if type(step).__name__ in SCALERS and is_sklearn(step) and not getattr(step, "clip", False):
        return _scale(step, numbers)
    if is_sklearn(step):
        plain = nameless(step)
        return lambda rows: _dense(plain.transform(numbers(rows)))
    raise NotKnown(type(step).__name__)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _dense(values: Any) -> np.ndarray:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype="float64")


def _check_names(part: Any, columns: Columns) -> None:
    # scikit-learn refuses a frame in another order
    if tuple(getattr(part, "feature_names_in_", columns.names)) != columns.names:
        raise NotKnown(f"{type(part).__name__} was fitted on other columns")


def _numbers(block: Block, part: Any = None) -> Numbers:
    """`block` as float64, to go into `part`."""
    if not isinstance(block, Columns):
        return block
    _check_names(part, block)
    columns = block
    if columns.cast == DATE and columns.fill:
        return partial(_dates, columns, columns.fill)
    if columns.cast or any(value is UNSURE for value in columns.fill or ()):
        raise NotKnown("text where numbers are needed")
    if not columns.numeric:
        numbers: Numbers = partial(_floats, columns)
    elif columns.at == tuple(range(columns.at[0], columns.at[-1] + 1)):
        span = slice(columns.at[0], columns.at[-1] + 1)
        numbers = lambda rows: rows[:, span]  # type: ignore[call-overload]  # noqa: E731
    else:
        places = list(columns.at)
        numbers = lambda rows: rows[:, places]  # type: ignore[call-overload]  # noqa: E731
    fill = np.asarray(columns.fill or np.nan, dtype="float64")
    return numbers if np.isnan(fill).all() else lambda rows: _filled(numbers(rows), fill)


def _floats(columns: Columns, rows: Rows) -> np.ndarray:
    out = np.empty((len(rows[0]), len(columns.at)), order="F")  # as a frame has it, which can decide the last bit
    for i in range(len(columns.at)):
        out[:, i] = columns.of(rows, i)  # None becomes nan
    return out


def _dates(columns: Columns, fills: tuple, rows: Rows) -> np.ndarray:
    """As numpy counts them, in the unit of the cast; through objects, as it does in the model."""
    out = np.empty((len(rows[0]), len(columns.at)))
    for i, fill in enumerate(fills):
        values = [fill if value is None or value != value else value for value in columns.of(rows, i)]
        out[:, i] = np.array(values, dtype=object).astype(columns.cast).astype("float64")
    return out


def _filled(x: np.ndarray, fill: np.ndarray) -> np.ndarray:
    missing = np.isnan(x)
    return np.where(missing, fill, x) if missing.any() else x


def _side_by_side(parts: list[Numbers]) -> Numbers:
    return parts[0] if len(parts) == 1 else lambda rows: np.concatenate([part(rows) for part in parts], axis=1)


def _column_transformer(step: ColumnTransformer, block: Block) -> Numbers:
    if not isinstance(block, Columns) or block.fill is not None or block.cast or step.transformer_weights:
        raise NotKnown("a ColumnTransformer over what is no plain column")
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
        parts.append(_numbers(_transform(transformer, replace(block, at=at, names=tuple(names)))))
    return _side_by_side(parts)


def _function(step: FunctionTransformer, block: Block) -> Block:
    func, settings = step.func, step.kw_args or {}
    if func is None:
        return block
    if isinstance(func, np.ufunc) and not settings:
        numbers = _numbers(block, step)
        return lambda rows: func(numbers(rows))
    if func is np.asarray and list(settings) == ["dtype"]:
        dtype = np.dtype(settings["dtype"])
        if dtype == np.float64:
            return _numbers(block)
        if isinstance(block, Columns) and not block.cast and dtype.kind == "O":
            return block
        if isinstance(block, Columns) and not block.cast and block.fill and dtype.name in (TEXT, DATE):
            return replace(block, cast=dtype.name)
    raise NotKnown(f"FunctionTransformer({func})")


def _fill(step: SimpleImputer, columns: Columns) -> Columns:
    """An imputer of text, or of objects that hide what is missing."""
    if columns.fill is not None or columns.cast or step.indicator_ is not None:
        raise NotKnown("an imputer over what is already filled")
    if not step.keep_empty_features and pd.isna(step.statistics_).any():
        raise NotKnown("an imputer that drops columns")
    if step.missing_values is pd.NA:  # stands for any marker of a missing value
        return replace(columns, fill=tuple(step.statistics_))
    # of None and nan it fills one, and which of them comes depends on the other rows
    return replace(columns, fill=(UNSURE,) * len(columns.at))


def _impute(step: SimpleImputer, numbers: Numbers) -> Numbers:
    fill, marker = step.statistics_.astype("float64"), step.missing_values
    seen = None if step.keep_empty_features or not np.isnan(fill).any() else ~np.isnan(fill)
    flagged = None if step.indicator_ is None or not len(step.indicator_.features_) else step.indicator_.features_
    is_nan = isinstance(marker, float) and math.isnan(marker)
    if marker is pd.NA or marker is None:
        raise NotKnown(f"SimpleImputer(missing_values={marker}) of numbers")

    def impute(rows: Rows) -> np.ndarray:
        x = numbers(rows)
        missing = np.isnan(x) if is_nan else finite(x) == marker
        if missing.any():
            x = np.where(missing, fill, x)
        if seen is not None:
            x = x[:, seen]
        return x if flagged is None else np.concatenate([x, missing[:, flagged]], axis=1)

    return impute


def _scale(step: Any, numbers: Numbers) -> Numbers:
    todo = SCALERS[type(step).__name__]
    steps = [(apply, getattr(step, name)) for apply, name, setting in todo if getattr(step, setting, True)]

    def scale(rows: Rows) -> np.ndarray:
        x = numbers(rows)
        for apply, value in steps:
            x = apply(x, value)
        return x

    return scale


def _encode(encoder: Any, columns: Columns) -> Numbers:
    if columns.cast == DATE:
        raise NotKnown("categories of dates")
    looked_up = list(enumerate(lookups(encoder, columns.fill, columns.cast == TEXT)))
    return lambda rows: np.concatenate([each.rows(columns.of(rows, i).tolist()) for i, each in looked_up], axis=1)
