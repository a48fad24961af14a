"""CSV: the cells as they are written, and the columns as numbers, booleans, dates and text."""

import csv
import io
import logging
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from alacarte.errors import UserError, as_argument, first_line

# An empty cell is missing in every column. In columns of numbers and booleans, these words are missing, too.
MISSING = ["#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"]
MISSING += ["NULL", "NaN", "None", "n/a", "nan", "null"]

DECIMAL_COMMA = r"[+-]?(?:\d{1,3}(?:\.\d{3})+|\d+)(?:,\d+)?"  # 1.234,5
DECIMAL_POINT = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"  # 1,234.5
EITHER = r"[+-]?[1-9]\d{0,2},\d{3}"  # 1,234: a fraction or thousands
DECORATED = r"[^\w.,+-]*[+-]?\d[\d.,']*[^\w.,]*"  # $5, 12 %
DATE = r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d)?)?"  # 2024-05-31T12:30:00Z
NUMBER_TYPES = ("double", "float", "long", "integer")  # of a model signature
MOSTLY = 0.9  # share of numbers in a column of text from which a warning says so

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellRules:
    """How the cells of a table become values. docs/data.md explains the keys."""

    missing: Sequence[str] | None = None  # None: MISSING, but only in columns of numbers and booleans
    decimal: str | None = None
    text: Sequence[str] = ()  # columns
    numbers: Sequence[str] = ()  # columns

    def for_model(self, types: Mapping[str, str]) -> "CellRules":
        """These rules, and the types of a model (`tables.column_types`)."""
        text = [name for name, kind in types.items() if kind == "string"]
        numbers = [name for name, kind in types.items() if kind in NUMBER_TYPES]
        return replace(self, text=[*self.text, *text], numbers=[*self.numbers, *numbers])


@dataclass(frozen=True)
class CsvFile:
    """The content of one CSV file. `path` names it in messages."""

    path: str
    content: bytes
    separator: str

    @cached_property
    def columns(self) -> list[str]:
        """The column names, without spaces before them. UserError for a header that names no columns."""
        lines = io.TextIOWrapper(io.BytesIO(self.content), "utf-8-sig", newline="")
        with reading(self.path):
            rows = csv.reader(lines, delimiter=self.separator, skipinitialspace=True)
            header: list[str] = next((row for row in rows if row), [])
        if not any(header):
            raise UserError(f"data.path={self.path}: the file is empty: give one with a header and rows")
        if repeated := sorted({name for name in header if name and header.count(name) > 1}):
            names = ", ".join(repeated)
            raise UserError(f"data.path={self.path}: the header has {names} more than once: rename the columns")
        if len(header) == 1 and (other := re.search(r"[;\t|,]", header[0])):
            argument = as_argument("data.separator", other[0].replace("\t", r"\t"))
            raise UserError(f"data.path={self.path}: the file reads as one column, {header[0]!r}: use {argument}")
        return header

    def as_written(self) -> pd.DataFrame:
        """Every cell as text, character for character. Quotes around a cell are no part of it."""
        quote_after_space = re.search(re.escape(self.separator.encode()) + b' +"', self.content)
        frame = self._parse(dtype="str", skipinitialspace=bool(quote_after_space))
        frame.columns = pd.Index(self.columns)
        return frame

    def typed(self, rules: CellRules, only: Sequence[str] | None = None) -> pd.DataFrame:
        """The columns as numbers, booleans, dates and text, by the rules and by their content.

        Spaces after a separator do not count. `only` reads these columns alone, without warnings.
        """
        words = MISSING if rules.missing is None else [word for word in rules.missing if word]
        settings: dict[str, Any] = {
            "na_values": ["", *words],
            "decimal": rules.decimal or ".",
            "skipinitialspace": True,
        }
        settings["dtype"] = {name: "str" for name in rules.text if name in self.columns}
        frame = self._parse(**settings, usecols=only)
        texts = frame.columns[frame.dtypes == "str"]
        for name in texts:  # pandas forgets missing values among integers of 2**63 to 2**64
            frame[name] = frame[name].mask(frame[name] == "")
        notes = self._restore_words(frame, words, is_default=rules.missing is None)
        for name in texts.difference(list(rules.text), sort=False):
            frame[name], note = read_dates(frame[name], words)
            if note is None:
                frame[name], note = read_numbers(frame[name], rules.decimal, words)
            notes += [note] if note else []
        for name in set(rules.numbers) & set(frame):
            require_numbers(frame[name])
        if only is None:
            if self.columns[0] == "":
                notes.append("the first column has no name; it is taken for row numbers and left out")
                frame = frame.drop(columns=frame.columns[0])
            for note in notes:
                logger.warning("data.path=%s: %s", self.path, note)
        return frame

    def _restore_words(self, frame: pd.DataFrame, words: Sequence[str], is_default: bool) -> list[str]:
        """By default, words such as NA are values of a column of text: put them back. Return notes for the user."""
        columns = [name for name in frame if frame[name].isna().any()]
        if not columns or not any(word.encode() in self.content for word in words):
            return []
        written = self._parse(usecols=columns, dtype="str", na_values=[""], skipinitialspace=True)
        read, kept = [], []
        for name in columns:
            counts = written[name][frame[name].isna() & written[name].notna()].value_counts()
            if is_default and frame[name].dtype == "str":
                frame[name] = written[name]
                kept += [(name, word, count) for word, count in counts.items()]
            else:
                read += [(name, word, count) for word, count in counts.items()]

        def listed(counts: list[tuple[str, str, int]]) -> str:
            more = f" and {len(counts) - 10} more" if len(counts) > 10 else ""
            return ", ".join(f"{word!r} ({count:,} in {name!r})" for name, word, count in counts[:10]) + more

        hint = "; data.missing=[] reads only empty cells as missing" if is_default else ""
        notes = [f"read as missing: {listed(read)}{hint}"] if read else []
        if kept:
            argument = as_argument("data.missing", sorted({word for _, word, _ in kept}))
            notes.append(f"kept as text: {listed(kept)}; {argument} reads them as missing")
        return notes

    def _parse(self, **settings: Any) -> pd.DataFrame:
        assert self.columns
        with reading(self.path), warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            try:
                # low_memory would type a column by chunks, and mix numbers with text
                return pd.read_csv(
                    io.BytesIO(self.content), sep=self.separator, index_col=False, low_memory=False,
                    keep_default_na=False, **settings,
                )  # fmt: skip
            except pd.errors.ParserWarning:
                n, hint = len(self.columns), f"name every column, and quote text with {self.separator!r} in it"
                raise UserError(f"data.path={self.path}: a row has more fields than the header, {n}: {hint}") from None


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn any error of a format or a file system, which each have their own kinds, into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > utf8.csv"
        raise UserError(f"data.path={path}: the file is not in UTF-8: convert it, such as with {command}") from error
    except Exception as error:
        hint = "is it CSV in UTF-8, or Parquet, as its name says?"
        raise UserError(f"data.path={path}: cannot be read: {first_line(error)}: {hint}") from error


def read_numbers(
    column: pd.Series, decimal: str | None = None, missing: Sequence[str] = ()
) -> tuple[pd.Series, str | None]:
    """A column of text as float64 if all its values are numbers in one notation, else as it is; and a note for the user.

    Blank cells and the words `missing` are no numbers. `decimal` decides about values such as 1,234.
    """
    codes, values = pd.factorize(column)
    written = pd.Series(values, dtype="str").str.strip()
    numbers = pd.to_numeric(written, errors="coerce").astype("float64")
    if decimal == ",":
        numbers = numbers.mask(written.str.contains(".", regex=False))
    is_value = ~(written.isin(["", *missing]))
    texts = written[is_value & numbers.isna()]
    name, rows = column.name, np.bincount(codes[codes >= 0], minlength=len(values))
    if not is_value.any():
        return column, None
    keep = as_argument("data.text", [str(name)])
    if texts.empty:
        note = None
    elif _matches(written[is_value], DECIMAL_COMMA) and (decimal == "," or not _matches(texts, EITHER)):
        numbers = pd.to_numeric(written.str.replace(".", "").str.replace(",", "."), errors="coerce").astype("float64")
        note = f"column {name!r} is read as numbers with a decimal comma, such as {texts.iloc[0]!r}; {keep} reads text"
    elif _matches(written[is_value], DECIMAL_POINT) and (decimal == "." or not _matches(texts, EITHER)):
        numbers = pd.to_numeric(written.str.replace(",", ""), errors="coerce").astype("float64")
        note = f"column {name!r} is read as numbers with commas, such as {texts.iloc[0]!r}; {keep} reads text"
    else:
        return column, _doubt(name, texts, rows[texts.index].sum() / rows[is_value].sum(), decimal, keep)
    taken = np.append(numbers.where(is_value), np.nan)[codes]
    return pd.Series(taken, index=column.index, name=name), note


def read_dates(column: pd.Series, missing: Sequence[str] = ()) -> tuple[pd.Series, str | None]:
    """A column of text as dates in UTC if all its values are dates of ISO 8601, else as it is; and a note for the user."""
    codes, values = pd.factorize(column)
    written = pd.Series(values, dtype="str").str.strip()
    dates = written.mask(written.isin(["", *missing]))
    if not (dates.notna().any() and _matches(dates.dropna(), DATE)):
        return column, None
    try:
        read = pd.to_datetime(dates, utc=True, format="ISO8601")
    except ValueError:  # such as 2024-13-01
        return column, None
    keep = as_argument("data.text", [str(column.name)])
    read = read.reindex(codes).set_axis(column.index).rename(column.name)
    return read, f"column {column.name!r} is read as dates, such as {dates.dropna().iloc[0]!r}; {keep} reads text"


def _doubt(name: Any, texts: pd.Series, share: float, decimal: str | None, keep: str) -> str | None:
    """A warning about a column of text that nearly consists of numbers; None for other columns."""
    start = f"column {name!r} is read as text because of values such as {texts.iloc[0]!r}"
    if _matches(texts, EITHER) and decimal is None:
        return f"{start}: use \"data.decimal=','\" or data.decimal=. to read numbers, or {keep}"
    if share <= 1 - MOSTLY:
        missing = as_argument("data.missing", texts.head(5).tolist())
        return f"{start}: if they mean missing values, use {missing}, else {keep}"
    if _matches(texts, DECORATED):
        return f"{start}: remove the other characters from the file, or use {keep}"
    return None


def require_numbers(column: pd.Series) -> None:
    """UserError, with one of the values, for a column that must hold numbers and holds text."""
    if column.dtype == "str" and column.notna().any():
        texts = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        example = (texts if len(texts) else column.dropna()).iloc[0]
        raise UserError(
            f"column {column.name!r} holds {example!r}, but the model needs numbers: correct {len(texts)} of {len(column)} "
            f"rows, or use {as_argument('data.missing', [str(example)])}"
        )


def _matches(texts: pd.Series, pattern: str) -> bool:
    return bool(texts.str.fullmatch(pattern).all())
