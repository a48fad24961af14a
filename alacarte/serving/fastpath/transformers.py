"""A fitted model as a few numpy calls, without the frames, checks and copies between its steps.

Known are the preprocessing of `features=tabular`, and a StandardScaler in front of numeric columns. The arithmetic is that of
scikit-learn in the same order, so answers agree to the last bits. `compile_model` raises NotKnown for every other step. Its
function raises ValueError for rows that only the model itself can judge. The caller then asks the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from alacarte.features import NO_DATE, is_tabular
from alacarte.formats.network import NetworkModel
from alacarte.serving.fastpath.estimators import Labels, NotKnown, compile_estimator, compile_network

# (n, d) float64, or d object arrays (n,) of plain Python values in which None is missing.
Inputs = np.ndarray | list[np.ndarray]
# From inputs to (n, k) float64. Never writes into the inputs.
Transform = Callable[[Inputs], np.ndarray]

MAX_CELLS = 10_000_000  # of the table of all categories: 80 MB


def compile_model(model: Any, names: list[str], numeric: bool) -> Callable[[Inputs], Labels]:
    """The predict of a fitted scikit-learn estimator or Pipeline, or of a network. Labels are those of the model.

    Raises NotKnown, or any error for a model of another version.
    """
    if isinstance(model, NetworkModel):
        steps, predict = [] if model.preprocess is None else [model.preprocess], compile_network(model)
    else:
        *steps, estimator = _steps(model)
        predict = compile_estimator(estimator)
    if list(getattr(model, "feature_names_in_", names)) != names:
        raise NotKnown("fitted on other columns")  # scikit-learn refuses a frame in another order
    numbers: Transform = lambda inputs: inputs  # type: ignore[assignment,return-value]  # noqa: E731
    if is_tabular(steps[0] if steps else None):
        numbers = _tabular(steps.pop(0), names, numeric)
    elif not numeric:
        raise NotKnown("columns that are no numbers")
    for step in steps:
        if type(step) is not StandardScaler or not step.with_mean or not step.with_std:
            raise NotKnown(type(step).__name__)
        numbers = _scale(numbers, step)
    return lambda inputs: predict(numbers(inputs))


def _steps(model: Any) -> Iterator[Any]:
    if type(model) is Pipeline:
        for _, step in model.steps:
            yield from _steps(step)
    else:
        yield model


def _scale(numbers: Transform, scaler: StandardScaler) -> Transform:
    mean, scale = scaler.mean_, scaler.scale_
    return lambda inputs: (numbers(inputs) - mean) / scale


# --- features=tabular ---


def _tabular(transformer: ColumnTransformer, names: list[str], numeric: bool) -> Transform:
    compilers = {"numeric": _numeric, "text": _text, "date": _date}
    parts = []
    for kind, pipe, columns in transformer.transformers_:
        if kind in compilers:
            parts.append(compilers[kind](pipe, [names.index(column) for column in columns], numeric))
    return parts[0] if len(parts) == 1 else lambda inputs: np.concatenate([part(inputs) for part in parts], axis=1)


def _numeric(pipe: Pipeline, at: list[int], numeric: bool) -> Transform:
    def read(inputs: Any) -> np.ndarray:
        if numeric:
            return inputs[:, at]
        out = np.empty((len(inputs[0]), len(at)), order="F")  # like a frame, which can decide the last bit
        for i, place in enumerate(at):
            out[:, i] = inputs[place]  # None becomes nan
        return out

    return _fill_and_scale(read, pipe, np.isnan)


def _date(pipe: Pipeline, at: list[int], numeric: bool) -> Transform:
    def read(inputs: Any) -> np.ndarray:
        """As numpy counts microseconds, through objects as in the model."""
        out = np.empty((len(inputs[0]), len(at)))
        for i, place in enumerate(at):
            values = ["NaT" if value is None or value != value else value for value in inputs[place]]
            out[:, i] = np.array(values, dtype=object).astype("datetime64[us]").astype("float64")
        return out

    return _fill_and_scale(read, pipe, lambda x: x == NO_DATE)


def _fill_and_scale(read: Transform, pipe: Pipeline, is_missing: Callable[[np.ndarray], np.ndarray]) -> Transform:
    """The last two steps of a pipe: an imputer, which also says which values were missing, and a scaler."""
    fill, flagged = pipe[-2].statistics_, pipe[-2].indicator_.features_

    def numbers(inputs: Inputs) -> np.ndarray:
        x = read(inputs)
        missing = is_missing(x)
        if missing.any():
            x = np.where(missing, fill, x)
        return np.concatenate([x, missing[:, flagged]], axis=1) if len(flagged) else x

    return _scale(numbers, pipe[-1])


def _text(pipe: Pipeline, at: list[int], numeric: bool) -> Transform:
    """One look-up per value in a table with the encoder's own output for each category."""
    codes, tables = [], _tables(pipe[-1])
    for known, missing in zip(pipe[-1].categories_, pipe[1].statistics_, strict=True):
        code = {category: i for i, category in enumerate(known.tolist())}
        codes.append(code | {None: code.get(missing, len(code))})

    def encode(inputs: Any) -> np.ndarray:
        parts = []
        for place, code, table in zip(at, codes, tables, strict=True):
            values = inputs[place].tolist()
            parts.append(table[[code[value] if value in code else _code(value, code) for value in values]])
        return np.concatenate(parts, axis=1)

    return encode


def _code(value: Any, code: dict[str | None, int]) -> int:
    if value != value:
        return code[None]
    return code.get(str(value).rstrip("\0"), len(code) - 1)  # numpy's text drops the zero characters at its end


def _tables(encoder: OneHotEncoder) -> list[np.ndarray]:
    """For each column the encoder's output for its categories, and in the last row for a text that is none of them."""
    samples = [[*known.tolist(), f"not {max(known, key=len)}"] for known in encoder.categories_]
    n, widths = max(map(len, samples)), encoder._n_features_outs
    if n * sum(widths) > MAX_CELLS:
        raise NotKnown("too many categories")
    padded = [column + column[:1] * (n - len(column)) for column in samples]
    encoded = encoder.transform(np.array(padded, dtype=object).T)
    ends = np.cumsum(widths)
    return [encoded[: len(column), end - width : end] for column, end, width in zip(samples, ends, widths, strict=True)]
