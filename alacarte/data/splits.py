"""The train, validation and test parts of a table: by a hash of each row, by time, or as a column says.

With a hash, the part of a row stays the same when other rows are added, removed or reordered. Only large groups of equal
rows may move, where the shares of the parts would otherwise be clearly wrong.
"""

import hashlib
import logging
import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data.csv_reader import DATE, DECIMAL_COMMA, MISSING
from alacarte.errors import UserError, check_number

PARTS = ("train", "val", "test")
LARGE_GROUP = 10, 0.005  # rows, and share of all rows, from which a group of equal rows is large

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitRule:
    """`data.split` of the configuration."""

    by: str  # "hash", "time" or "column"
    column: str | None
    val: float
    test: float
    seed: int
    as_input: bool  # whether `column` is an input, too

    @classmethod
    def of(cls, split: Mapping[str, Any] | None) -> "SplitRule":
        """UserError for a setting that cannot be followed."""
        if split is None:
            raise UserError(
                "data.split is missing: add split: {val: 0.15, test: 0.2, seed: 0}, as conf/data/digits.yaml has it"
            )
        by, column = split.get("by", "hash"), split.get("column")
        val, test, seed = split.get("val", 0.15), split.get("test", 0.2), split.get("seed", 0)
        if by not in ("hash", "time", "column"):
            raise UserError(f"data.split.by={by}: use hash, time or column")
        if (by == "hash") != (column is None):
            needed = "needs no data.split.column" if by == "hash" else "needs data.split.column=COLUMN"
            raise UserError(f"data.split.by={by} data.split.column={column or 'null'}: data.split.by={by} {needed}")
        for name, fraction in (("val", val), ("test", test)):
            check_number(f"data.split.{name}", fraction, lambda x: 0 < x < 1, "a fraction between 0 and 1, such as 0.2")
        if val + test >= 1:
            raise UserError(f"data.split.val={val} and data.split.test={test} leave no train part: lower one of them")
        check_number("data.split.seed", seed, lambda n: isinstance(n, int), "a whole number")
        return cls(by, None if column is None else str(column), val, test, seed, bool(split.get("as_input")))

    @property
    def fractions(self) -> dict[str, Any]:
        """The arguments of `hash_split`."""
        return {"val": self.val, "test": self.test, "seed": self.seed}

    def assign(self, groups: np.ndarray, column: pd.Series | None) -> np.ndarray:
        """(n,) of PARTS for (n,) hashes of groups that stay together, or for the (n,) values of a column."""
        if self.by == "column":
            return split_by_column(column)
        if self.by == "time":
            split, reason = split_by_time(column, self.val, self.test), "rows with equal times stay together"
        else:
            split, reason = balanced_split(groups, **self.fractions), "rows with equal inputs or keys stay together"
            reason += f", and {len(np.unique(groups))} of {len(groups)} rows differ"
        if _excess(split, self.val, self.test) > 0:
            shares = ", ".join(f"{part} {np.mean(split == part):.0%}" for part in PARTS)
            fractions = self.val, self.test
            logger.warning("data.split: val=%g test=%g, but the parts are %s: %s", *fractions, shares, reason)
        return split


def split_by_time(times: pd.Series, val: float, test: float) -> np.ndarray:
    """The newest rows are the test part, and the next newest the validation part. Rows with equal times stay together."""
    if times.dtype == "str":
        dates = pd.to_datetime(times, errors="coerce", utc=True, format="ISO8601")
        unreadable = times[dates.isna() & times.notna()]
        if len(unreadable):
            raise UserError(
                f"data.split.column={times.name}: {unreadable.iloc[0]!r} is no time: write dates as 2024-05-31, or numbers"
            )
        times = dates
    if n := int(times.isna().sum()):
        logger.warning("data.split.column=%s: %d rows without a time go to train", times.name, n)
    counts = times.value_counts().sort_index(ascending=False)
    share_newer = ((counts.cumsum() - counts / 2) / len(times)).reindex(times).to_numpy()  # up to the middle of a time
    return np.select([share_newer < test, share_newer < test + val], ["test", "val"], "train")


def split_by_column(names: pd.Series) -> np.ndarray:
    """The part that each row names."""
    split = names.astype(object).where(names.notna(), "").astype(str).str.strip().str.lower()
    wrong = names[~split.isin(PARTS)]
    if len(wrong):
        value = "no value" if pd.isna(wrong.iloc[0]) else repr(wrong.iloc[0])
        raise UserError(f"data.split.column={names.name} has {value} in {len(wrong)} rows: write train, val or test")
    return split.to_numpy("U5")


def balanced_split(groups: np.ndarray, *, val: float, test: float, seed: int) -> np.ndarray:
    """As `hash_split`, but large groups get other hashes until the shares of the parts fit."""
    split = best = hash_split(groups, val=val, test=test, seed=seed)
    codes = pd.factorize(groups)[0]
    is_large = np.bincount(codes)[codes] >= max(LARGE_GROUP[0], LARGE_GROUP[1] * len(groups))
    for attempt in range(1, 101 if is_large.any() else 1):
        if _excess(split, val, test) <= 0:
            return split
        others = hash_split(_mix(groups[is_large] + np.uint64(attempt)), val=val, test=test, seed=seed)
        split = split.copy()
        split[is_large] = others
        best = min(best, split, key=lambda candidate: _excess(candidate, val, test))
    return best


def _excess(split: np.ndarray, val: float, test: float) -> float:
    """By how much the share of a part differs from its fraction beyond chance; at most 0 where all shares fit."""
    pairs = [(np.mean(split == part), fraction) for part, fraction in (("val", val), ("test", test))]
    return max(abs(share - f) - max(0.03, 3 * (f * (1 - f) / len(split)) ** 0.5) for share, f in pairs)


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
    """(n,) uint64: the nanoseconds of a date, the float64 of a number, each also from its text; a hash of other text."""
    if column.dtype.kind == "M":
        return np.where(column.isna(), _value_bits(np.nan), column.to_numpy().view(np.uint64))
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
    if isinstance(value, str):
        value = value.strip()
        value = "nan" if value in ("", *MISSING) else value
        if re.fullmatch(DATE, value):
            with suppress(ValueError):  # such as 2024-13-01
                return pd.to_datetime(value, utc=True).as_unit("ns").value % 2**64
        value = (
            value.replace(".", "").replace(",", ".") if re.fullmatch(DECIMAL_COMMA, value) and "," in value else value
        )
    try:
        number = float(value)
    except ValueError:
        if value.lower() not in ("true", "false"):
            return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest())
        number = float(value.lower() == "true")
    return struct.unpack("=Q", struct.pack("=d", np.nan if np.isnan(number) else number + 0.0))[0]


def check_parts(
    y: pd.Series, split: np.ndarray, groups: np.ndarray, task: str, rule: SplitRule, weights: np.ndarray | None = None
) -> None:
    """UserError for a part without a row or with weights of 0 only, and for regression with a single row.

    `groups` are the (n,) hashes from which `split` comes.
    """
    needed = 1 if task == "classification" else 2
    for part in PARTS:
        if (count := int((split == part).sum())) < needed:
            advice = "more rows are needed" if rule.by == "hash" else "change the column or data.split"
            need = f"{count} of {len(y)} rows into {part}, which needs {needed}{_together(groups)}"
            raise UserError(f"data.split.by={rule.by} puts {need}: {advice}")
        if weights is not None and not weights[split == part].any():
            raise UserError(
                f"data.weight: all {count} rows of {part} have the weight 0: leave such rows out of the data"
            )


def place_rare_classes(
    y: pd.Series, split: np.ndarray, groups: np.ndarray, rule: SplitRule, rare_classes: str
) -> np.ndarray:
    """(n,) parts after a decision about classes that a part lacks: "dropped" is a part, too.

    A time and a column decide alone about the parts, so there a class is rare only where train lacks it.
    UserError with rare_classes="error", and where fewer than two classes would remain.
    """
    if rare_classes not in ("keep", "drop", "error"):
        raise UserError(f"data.rare_classes={rare_classes}: use keep, drop or error")
    counts = pd.crosstab(y.to_numpy(), split).reindex(columns=PARTS, fill_value=0)
    lacks = counts == 0 if rule.by == "hash" else counts[["train"]] == 0
    rare = counts.index[lacks.any(axis=1)]
    if rare.empty:
        return split
    advice = "more such rows are needed"
    if rare_classes == "error" or len(counts) - len(rare) < 2:
        label, part = rare[0], next(part for part in lacks if lacks.loc[rare[0], part])
        where = f"{counts.loc[label, part]} of {counts.loc[label].sum()} rows with {y.name}={label} are in {part}"
        if len(counts) > len(y) / 5:
            advice = f"{y.name} has {len(counts)} classes in {len(y)} rows: name another data.target, or use data.task=regression"
        raise UserError(f"data.rare_classes={rare_classes}: {where}, which needs 1{_together(groups)}: {advice}")
    names = ", ".join(f"{label} ({counts.loc[label].sum()} rows)" for label in rare[:10])
    action = "are left out" if rare_classes == "drop" else "go to train"
    logger.warning(
        "data.rare_classes=%s: classes without a row in every part %s: %s: %s", rare_classes, action, names, advice
    )
    rows = y.isin(rare).to_numpy()
    if rare_classes == "drop":
        return np.where(rows, "dropped", split)
    return np.where(np.isin(groups, groups[rows]) if rule.by == "hash" else rows, "train", split)


def _together(groups: np.ndarray) -> str:
    n = len(np.unique(groups))
    return f" (equal inputs or keys stay together: {n} differ)" if n < len(groups) else ""
