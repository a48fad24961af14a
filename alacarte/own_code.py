"""Errors in the features and models of the team become one line: the function, the column, and the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import issparse

from alacarte.errors import UserError


@contextmanager
def rows_fit(
    X: pd.DataFrame, function: str | None = None, subject: str = "data: the rows do not fit the model"
) -> Iterator[None]:
    """Turn an error about a value in X, and any error of the team's own code, into a UserError of one line.

    `function` made the transformer: each of its errors is an error of the team's own code. `subject` begins the message of
    an error of scikit-learn or numpy.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        own = _own_function(error)
        if own or function:
            name = own or ""
            if function and function != own:
                name = f"{function}: {own}" if own else function
            key = error.args[0] if isinstance(error, KeyError) and error.args else None
            missing = isinstance(key, str) and key not in X.columns
            column = " (the data have no column of this name)" if missing else _column_with(reason, X)
            raise UserError(f"{name}: {type(error).__name__}: {reason}{column}") from error
        if not isinstance(error, ValueError | TypeError):
            raise
        if value := re.search(r"string to float: '(.*)'|datetime string \"(.*)\" at", reason):
            text, wanted = value[1] or value[2], "numbers" if value[1] else "dates"
            raise UserError(
                f"data: column {_columns_of(text, X)} holds {text!r}, but the model needs {wanted}"
            ) from error
        raise UserError(f"{subject}: {reason}") from error


def describe(estimator: Any) -> str:
    """The classes and functions of `project` in an estimator or transformer, otherwise its class."""
    params = estimator.get_params() if hasattr(estimator, "get_params") else {}
    parts = [value if hasattr(value, "__qualname__") else type(value) for value in (estimator, *params.values())]
    own = [f"{part.__module__}.{part.__qualname__}" for part in parts if str(part.__module__).startswith("project.")]
    return " or ".join(dict.fromkeys(own)) or type(estimator).__name__


def check_inputs(inputs: Any, X: pd.DataFrame, transformer: Any, function: str | None = None) -> None:
    """UserError where the team's transformer does not return one row for each row, or returns missing values."""
    name = describe(transformer)
    name = f"{function}: {name}" if function and function != name else name
    shape: tuple[int, ...] = getattr(inputs, "shape", ())
    if len(shape) != 2:
        raise UserError(
            f"{name} returns {type(inputs).__name__} of shape {shape}: return a table or an array of two axes"
        )
    if shape[0] != len(X):
        raise UserError(f"{name} returns {shape[0]} rows for {len(X)} rows: return one row for each row")
    if shape[1] == 0:
        raise UserError(f"{name} returns no column: return one or more")
    values = inputs.data if issparse(inputs) else inputs
    missing = np.asarray(pd.isna(values))
    if not missing.any():
        return
    columns = [] if issparse(inputs) else np.flatnonzero(missing.any(axis=0)).tolist()
    names = list(inputs.columns) if isinstance(inputs, pd.DataFrame) else _output_names(transformer)
    shown = [repr(str(names[i])) if names else f"number {i}" for i in columns[:3]]
    raise UserError(
        f"{name} returns NaN{' in column ' + ', '.join(shown) if shown else ''}: fill missing values there, or use"
        " features=none with a model that takes them"
    )


def _own_function(error: Exception) -> str | None:
    """The function of `project` that raised an error, or called what raised it."""
    name, trace = None, error.__traceback__
    while trace:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module.startswith("project."):
            name = f"{module}.{trace.tb_frame.f_code.co_qualname}"
        trace = trace.tb_next
    return name


def _columns_of(text: str, X: pd.DataFrame) -> str:
    return " or ".join(repr(name) for name, column in X.items() if (column.astype(str) == text).any())


def _column_with(reason: str, X: pd.DataFrame) -> str:
    """The columns with the value that an error quotes."""
    quoted = re.search(r"'(.*?)'", reason)
    names = _columns_of(quoted[1], X) if quoted else ""
    return f" (column {names})" if names else ""


def _output_names(transformer: Any) -> list[str]:
    try:
        return transformer.get_feature_names_out().tolist()
    except (AttributeError, ValueError, TypeError, NotImplementedError):  # most own transformers have none
        return []
