"""The train, validation and test parts of a table, by a hash of each row.

The part of a row depends on nothing but the row, so it stays the same when others are added, removed or reordered.
"""

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from alacarte.errors import UserError

PARTS = ("train", "val", "test")


def hash_rows(frame: pd.DataFrame) -> np.ndarray:
    """(n,) uint64: a hash of each row of plain columns, whatever their order, and however pandas stores the values.

    A column changes its type when rows with a missing value or with text are appended, so 1, 1.0, True, "1" and "true" are
    the same to it.
    """
    rows = np.zeros(len(frame), np.uint64)
    for column in sorted(frame.columns):
        rows = _mix(rows ^ _bits(frame[column]))
    return rows


def hash_present(frame: pd.DataFrame) -> np.ndarray:
    """(n,) uint64: as `hash_rows`, but of the values that are there: a column that comes later, empty, changes nothing."""
    rows = np.zeros(len(frame), np.uint64)
    for column in sorted(frame.columns):
        name = int.from_bytes(hashlib.blake2b(str(column).encode(), digest_size=8).digest())
        rows = np.where(frame[column].isna(), rows, _mix(rows ^ _bits(frame[column]) ^ np.uint64(name)))
    return rows


def occurs_in(rows: pd.DataFrame, others: pd.DataFrame) -> np.ndarray:
    """(n,) bool: which of n `rows` are equal to one of `others` in all columns that both have.

    A column without any value on one side was not recorded there, and does not count. Without a column that counts, no
    row is equal to another.
    """
    columns = shared_columns(rows, others)
    if not columns or others.empty:
        return np.zeros(len(rows), bool)
    return np.isin(hash_present(rows[columns]), hash_present(others[columns]))


def shared_columns(rows: pd.DataFrame, others: pd.DataFrame) -> list[str]:
    """The columns of `rows` that `others` has too, each with a value on both sides."""
    return [name for name in rows if name in others and rows[name].notna().any() and others[name].notna().any()]


def hash_split(rows: np.ndarray, *, val: float, test: float, seed: int) -> np.ndarray:
    """(n,) of "train", "val" and "test" for (n,) hashes, each on its own.

    Hash and seed give a uniform number. The lowest are the test part and the highest the validation part, so that neither
    depends on the other's fraction, and a fraction that changes moves no row but into train or out of it.
    """
    salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest())
    uniform = (_mix(rows ^ np.uint64(salt)) >> np.uint64(11)) * 2.0**-53
    return np.select([uniform < test, uniform >= 1 - val], ["test", "val"], "train")


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64: each bit of the input changes each bit of the output half the time (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _bits(column: pd.Series) -> np.ndarray:
    """(n,) uint64: a date's nanoseconds, the float64 of whatever is or reads as a number, else a hash of the text."""
    if column.dtype.kind == "M":
        return column.to_numpy().view(np.uint64)
    if column.dtype.kind in "bif":
        return _float_bits(column.to_numpy(np.float64))
    codes, values = pd.factorize(column)
    bits = [_value_bits(value) for value in values]
    return np.array([*bits, _value_bits(np.nan)], np.uint64)[codes]  # code -1, a missing value, takes the last


def _float_bits(values: np.ndarray) -> np.ndarray:
    values = values + 0.0  # -0.0 becomes 0.0
    values[np.isnan(values)] = np.nan  # which has many bit patterns
    return values.view(np.uint64)


def _value_bits(value: Any) -> int:
    try:
        number = float(value)
    except ValueError:
        if value.lower() not in ("true", "false"):
            return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest())
        number = float(value.lower() == "true")
    return struct.unpack("=Q", struct.pack("=d", np.nan if np.isnan(number) else number + 0.0))[0]


def checked_split(split: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("val", "test"):
        fraction = split[name]
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise UserError(f"data.split.{name}={fraction}: give a fraction between 0 and 1, such as 0.2")
    val, test, seed = split["val"], split["test"], split["seed"]
    if val + test >= 1:
        raise UserError(f"data.split.val={val} and data.split.test={test} leave no train part: lower one of them")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"data.split.seed={seed}: give a whole number")
    return {"val": val, "test": test, "seed": seed}


def check_parts(y: pd.Series, split: np.ndarray, groups: np.ndarray, task: str, fractions: Mapping[str, Any]) -> None:
    """UserError unless each part has a row of each class, or two rows for regression; it names a seed that gives them.

    `groups` are the (n,) hashes that the (n,) parts of `split` come from, with the arguments `fractions` of `hash_split`.
    """
    labels = task == "classification"
    codes, classes = pd.factorize(y) if labels else (np.zeros(len(y), int), pd.Index(["any"]))
    need = 1 if labels else 2

    def lacking(split: np.ndarray) -> np.ndarray:
        counts = [np.bincount(codes[split == part], minlength=len(classes)) for part in PARTS]
        return np.argwhere(np.array(counts) < need)  # pairs of part and class

    lack = lacking(split)
    if not len(lack):
        return
    part, code = PARTS[lack[0][0]], lack[0][1]
    rows = codes == code
    what = (
        f"{np.sum(rows & (split == part))} of {np.sum(rows)} rows{f' with {y.name}={classes[code]}' if labels else ''}"
    )
    apart = len(np.unique(groups))
    together = f" (equal inputs or keys stay together: {apart} differ)" if apart < len(y) else ""
    seeds = range(100) if np.bincount(codes).min() >= len(PARTS) * need else ()  # no seed makes up for missing rows
    good = next((seed for seed in seeds if not len(lacking(hash_split(groups, **{**fractions, "seed": seed})))), None)
    if good is not None:
        mend = f"use data.split.seed={good}, with which every part has enough"
    elif len(classes) > len(y) / 5:
        mend = f"{y.name} has {len(classes)} classes in {len(y)} rows: name another data.target, or use data.task=regression"
    else:
        mend = "no seed from 0 to 99 gives every part enough: more such rows are needed, or larger parts in data.split"
    start = f"data.split.seed={fractions['seed']} puts {what} into {part}, which needs {need}"
    raise UserError(f"{start}{together}: {mend}")
