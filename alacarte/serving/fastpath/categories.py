"""The work of a OneHotEncoder or OrdinalEncoder as one look-up per value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.serving.fastpath.estimators import NotKnown

# The code of a value that only the model itself can encode.
ASK = -1

# Of the table of all columns together: 80 MB.
MAX_CELLS = 10_000_000


@dataclass(frozen=True)
class Lookup:
    """One column: the code of each category, and a table (n_codes, width) of the encoder's output per code."""

    codes: dict[Any, int]
    unknown: int  # the code of any other value
    missing: int
    is_text: bool  # values are cast to str first
    table: np.ndarray

    def encode(self, values: list) -> np.ndarray:
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


def make_lookups(encoder: Any, fill: tuple | None, is_text: bool) -> list[Lookup]:
    """One per column. `fill` are the values that replace the missing values of each, as Columns has them."""
    known = encoder.categories_
    samples = [
        categories.tolist() + ([] if encoder.handle_unknown == "error" else _unknown_value(categories))
        for categories in known
    ]
    widths = getattr(encoder, "_n_features_outs", [1] * len(known))
    encoded = _encode_samples(encoder, samples, sum(widths))
    lookups = []
    for i, end in enumerate(np.cumsum(widths)):
        codes = {value: code for code, value in enumerate(known[i].tolist()) if value is not None and value == value}
        unknown = len(known[i]) if len(samples[i]) > len(known[i]) else ASK
        table = np.ascontiguousarray(encoded[: len(samples[i]), end - widths[i] : end])
        missing = _code_of_missing(known[i], codes, unknown, fill[i] if fill else None, is_text)
        lookups.append(Lookup(codes, unknown, missing, is_text, table))
    return lookups


def _unknown_value(known: np.ndarray) -> list:
    """A list of one value of the same type that is not in `known`; empty where there may be none."""
    if known.dtype.kind in "OUS":
        return ["not " + max(map(str, known), key=len, default="")]
    if known.dtype.kind in "iuf":
        return [np.max(known[np.isfinite(known)], initial=0) + 1]
    return []


def _encode_samples(encoder: Any, samples: list[list], width: int) -> np.ndarray:
    """(n, width): the encoder's own output for the values of each column, all columns at once."""
    n = max(map(len, samples))
    if n * width > MAX_CELLS:
        raise NotKnown("too many categories")
    names = getattr(encoder, "feature_names_in_", range(len(samples)))
    frame = {}
    for name, column, known in zip(names, samples, encoder.categories_, strict=True):
        dtype = object if known.dtype.kind in "OUS" else known.dtype
        frame[name] = pd.Series(column + column[:1] * (n - len(column)), dtype=dtype)
    encoded = encoder.transform(pd.DataFrame(frame))
    return np.asarray(encoded.toarray() if hasattr(encoded, "toarray") else encoded, dtype="float64")


def _code_of_missing(known: np.ndarray, codes: dict, unknown: int, fill: Any, is_text: bool) -> int:
    if fill is not None and fill == fill:
        return codes.get(str(fill) if is_text else fill, unknown)
    if is_text:
        return ASK
    if len(codes) == len(known):
        return unknown
    return len(known) - 1 if known.dtype.kind == "f" else ASK  # text may have None and nan as categories
