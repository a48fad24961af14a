"""What a OneHotEncoder or OrdinalEncoder does, as one look-up per value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.serving.fastpath.estimators import NotKnown

# The code of a value of which only the model itself knows what becomes of it.
ASK = -1
# Stands for a missing value of which only the model itself knows what becomes of it.
UNSURE = object()

# Of the table of all columns together, 80 MB.
MAX_CELLS = 10_000_000


@dataclass(frozen=True)
class Lookup:
    """One column: the code of each category, and a table (n_codes, width) of what the encoder makes of it."""

    codes: dict[Any, int]
    unknown: int  # the code of any other value
    missing: int
    is_text: bool  # values are cast to str first
    table: np.ndarray

    def rows(self, values: list) -> np.ndarray:
        """(n, width) from n values, None or nan where missing. ValueError where only the model can judge."""
        codes = self.codes
        return self.table[[codes[value] if value in codes else self._code(value) for value in values]]

    def _code(self, value: Any) -> int:
        if value is None or value != value:
            code = self.missing
        else:  # numpy's text drops the zero characters at its end
            code = self.codes.get(str(value).rstrip("\0"), self.unknown) if self.is_text else self.unknown
        if code == ASK:
            raise ValueError("a value that only the model itself can judge")
        return code


def lookups(encoder: Any, fill: tuple | None, is_text: bool) -> list[Lookup]:
    """One per column. `fill` stands for the missing values of each, as Columns has it."""
    known = encoder.categories_
    alike = [_alike(encoder, i) for i in range(len(known))]
    asked = [categories[np.unique(like)].tolist() for categories, like in zip(known, alike, strict=True)]
    others = [[] if encoder.handle_unknown == "error" else _another(categories) for categories in known]
    widths = getattr(encoder, "_n_features_outs", [1] * len(known))
    found = _ask(encoder, [rows + other for rows, other in zip(asked, others, strict=True)], sum(widths))
    made = []
    for i, end in enumerate(np.cumsum(widths)):
        rows = np.searchsorted(np.unique(alike[i]), alike[i]).tolist()
        pairs = zip(known[i].tolist(), rows, strict=True)
        codes = {value: row for value, row in pairs if value is not None and value == value}
        unknown = len(asked[i]) if others[i] else ASK
        nan = ASK if len(codes) == len(rows) else rows[-1]  # nan is the last category
        missing = _code_of_missing(known[i], codes, unknown, nan, fill[i] if fill else None, is_text)
        table = found[: len(asked[i]) + len(others[i]), end - widths[i] : end]
        made.append(Lookup(codes, unknown, missing, is_text, np.ascontiguousarray(table)))
    return made


def _alike(encoder: Any, i: int) -> np.ndarray:
    """(n_categories,) the place of the first category that the encoder treats like this one: the rare share one."""
    alike = np.arange(len(encoder.categories_[i]))
    rare = getattr(encoder, "_infrequent_indices", None)  # per column an array, or None
    if rare and rare[i] is not None:
        alike[rare[i]] = rare[i][0]
    return alike


def _another(known: np.ndarray) -> list:
    """A value of the same type that is not in `known`, if there may be one."""
    if known.dtype.kind in "OUS":
        return ["another than " + max(map(str, known), key=len, default="")]
    if known.dtype.kind in "iuf":
        return [np.max(known[np.isfinite(known)], initial=0) + 1]
    return []


def _ask(encoder: Any, values: list[list], width: int) -> np.ndarray:
    """(n, width): what the encoder itself makes of the values of each column, all columns at once."""
    n = max(map(len, values))
    if n * width > MAX_CELLS:
        raise NotKnown("too many categories")
    names = getattr(encoder, "feature_names_in_", range(len(values)))
    frame = {}
    for name, column, known in zip(names, values, encoder.categories_, strict=True):
        dtype = object if known.dtype.kind in "OUS" else known.dtype
        frame[name] = pd.Series(column + column[:1] * (n - len(column)), dtype=dtype)
    found = encoder.transform(pd.DataFrame(frame))
    return np.asarray(found.toarray() if hasattr(found, "toarray") else found, dtype="float64")


def _code_of_missing(known: np.ndarray, codes: dict, unknown: int, nan: int, fill: Any, is_text: bool) -> int:
    if fill is UNSURE or (fill is None and is_text):
        return ASK
    if fill is None and nan == ASK:
        return unknown
    if fill is None or fill != fill:  # text may have None and nan as categories, and either may be what comes
        return nan if known.dtype.kind == "f" else ASK
    return codes.get(str(fill) if is_text else fill, unknown)
