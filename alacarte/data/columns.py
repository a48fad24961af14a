"""The columns of a table by their roles: the target and its task, inputs, weights, and settings that name columns."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data import tables
from alacarte.errors import UserError, as_argument, nearest

MOST_INTEGER_CLASSES = 20

logger = logging.getLogger(__name__)


def names_of(value: Any) -> list[str]:
    """Column names of a setting that holds one name, a list of names, or null."""
    return [] if value is None else [str(name) for name in ([value] if isinstance(value, str | int | float) else value)]


def check_columns(columns: Mapping[str, list[str]], frame: pd.DataFrame, source: str) -> None:
    """UserError for a setting that names a column which does not exist, and for settings that exclude each other."""
    for setting, names in columns.items():
        for name in set(names) - set(frame.columns):
            hint = nearest(name, frame.columns)
            if name.startswith("["):  # Hydra takes a list with a name such as Notes (free) for a text
                hint = "quote each name: " + as_argument(
                    f"data.{setting}", [part.strip(" '\"") for part in name[1:-1].split(",")]
                )
            raise UserError(f"data.{setting}={name}: {source} has no such column: {hint}")
    target = columns["target"]
    if others := [setting for setting in ("key", "drop", "weight", "split.column") if target[0] in columns[setting]]:
        raise UserError(f"data.target={target[0]} is also in data.{others[0]}: take it out of there")


def rows_with_target(frame: pd.DataFrame, target: str) -> pd.DataFrame:
    """The rows with a value in the target column."""
    missing = frame[target].isna()
    if missing.all():
        raise UserError(f"data.target={target}: none of the {len(frame)} rows has a value: name another column")
    if missing.any():
        logger.warning(
            "data.target=%s: %d of %d rows have no value and are left out", target, missing.sum(), len(frame)
        )
    return frame[~missing].reset_index(drop=True)


def weights_of(column: pd.Series) -> np.ndarray:
    weights = pd.to_numeric(tables.plain_column(column), errors="coerce").astype("float64").to_numpy()
    wrong = column[~(np.isfinite(weights) & (weights >= 0))]
    if len(wrong):
        raise UserError(f"data.weight={column.name}: {wrong.iloc[0]} in {len(wrong)} rows: give numbers of 0 or more")
    return weights


def input_of(column: pd.Series) -> pd.Series:
    plain = tables.plain_column(column)
    if plain.dtype.kind == "f" and (infinite := np.isinf(plain)).any():
        logger.warning("column %r: %d infinite values count as missing", column.name, infinite.sum())
        plain = plain.mask(infinite)
    if plain.isna().all():
        argument = as_argument("data.drop", [str(column.name)])
        raise UserError(
            f"column {column.name!r} has no value in any of {len(plain)} rows: leave it out with {argument}"
        )
    return plain


def target_of(column: pd.Series, task: str) -> tuple[pd.Series, str]:
    """Labels or numbers, and the task, by the rule in `load_data`. The column has no missing value."""
    setting = f"data.target={column.name}"
    categories = isinstance(column.dtype, pd.CategoricalDtype)
    y = tables.plain_column(column.astype(column.dtype.categories.dtype) if categories else column)
    if y.dtype.kind == "M":
        raise UserError(f"{setting} holds dates: name a column of classes or numbers")
    if y.dtype.kind == "f" and (infinite := int(np.isinf(y).sum())):
        raise UserError(f"{setting}: {infinite} of {len(y)} rows are infinite: correct or remove them")
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
                "correct or remove them, or use data.task=classification"
            )
        return values, task
    if len(fractions):
        raise UserError(
            f"data.task=classification: {setting} holds fractions, such as {fractions.iloc[0]}: use data.task=regression, "
            "or write the classes as text"
        )
    return y.astype("int64") if number else y, task
