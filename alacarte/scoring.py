"""Answer a table that a user gives: read it, check it, and write it with the answers of the model."""

import csv
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from fsspec.implementations.local import LocalFileSystem

from alacarte.data import tables
from alacarte.data.columns import names_of
from alacarte.data.csv_reader import CellRules
from alacarte.errors import UserError, nearest
from alacarte.learners import Learner

SUFFIXES = (".csv", ".parquet", ".pq")
# A spreadsheet runs text that begins so, also behind a tab or a line break and in full-width characters.
FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", re.ASCII)


def check_output(source: str, output: str, spreadsheet_safe: bool = False) -> None:
    """UserError, before any work, for an output that is the input, has no known format, or cannot be written."""
    output = str(output)
    if spreadsheet_safe and not output.lower().endswith(".csv"):
        raise UserError(f"spreadsheet_safe=true is for CSV alone, not output={output}: name a file that ends in .csv")
    if not output.lower().endswith(SUFFIXES):
        raise UserError(f"output={output}: the name must end in {', '.join(SUFFIXES)}: rename it")
    if _is_same(str(source), output):
        raise UserError(f"output={output} is the input, which would be lost: name another file")
    files, place = _place(output)
    if not isinstance(files, LocalFileSystem):
        return
    if Path(place).is_dir():
        raise UserError(f"output={output} is a folder: name a file in it")
    if not os.access(folder := Path(place).parent, os.W_OK):
        raise UserError(f"output={output}: {folder} is no folder that can be written: make it, or name another")


def _is_same(source: str, output: str) -> bool:
    read, written = tables.absolute(source), tables.absolute(output)
    try:
        return read == written or Path(read).samefile(written)
    except OSError:  # there is no such file, or it is a URL
        return False


def open_input(source: str, separator: str | None) -> tuple[tables.CsvFile | tables.ParquetFile, pd.DataFrame, str]:
    """The file, its rows as they are written, and its digest. UserError for a file that cannot be read or has no rows."""
    with _named_input():
        table = tables.open_table(source, separator)
        rows = table.as_written()
        digest = tables.path_digest(str(source))
    if rows.empty:
        raise UserError(f"input={source} has {len(rows.columns)} columns and {len(rows)} rows: give it rows to answer")
    return table, rows.set_axis(rows.columns.map(str), axis="columns"), digest


def read_inputs(table: tables.CsvFile | tables.ParquetFile, metadata: Mapping[str, Any]) -> pd.DataFrame:
    """The input columns of a model, read in the types of its signature; all columns without a signature.

    `metadata` is what the model records. Its words for missing values and its decimal sign apply to the file, too.
    """
    data = metadata.get("data") or {}
    types = {name: kind for name, kind in metadata["column_types"].items() if name != metadata.get("target")}
    with _named_input(f"input={table.path}: "):
        missing = data.get("missing")
        rules = CellRules(None if missing is None else names_of(missing), data.get("decimal")).for_model(types)
        names = list(types) or None
        columns = [] if names is None else table.columns
        for name in names or []:
            if name not in columns:
                hint = nearest(name, columns)
                raise UserError(f"input={table.path} has no column {name!r}, which the model takes: {hint}")
        frame = table.typed(rules, only=names)
        return pd.DataFrame({str(name): _plain(column) for name, column in frame.items()})


def answer(learner: Learner, inputs: pd.DataFrame, source: str, probabilities: bool = False) -> pd.DataFrame:
    """(n,) prediction and its probability, `confidence`, for a classifier; `probabilities`: one column for each class.

    UserError for values that the model does not take, and for `probabilities` of a model that has none.
    """
    with _named_input(f"input={source}: "):
        answers = {"prediction": learner.predict(inputs)}
        proba = learner.predict_proba(inputs)
    if proba is not None:
        classes = list(learner.classes or ())
        predicted = pd.Index(classes).get_indexer(answers["prediction"])
        # A model with a threshold may predict a class that is not the most probable one.
        answers["confidence"] = proba[np.arange(len(proba)), predicted]
        if probabilities:
            answers |= {f"probability_{label}": proba[:, i] for i, label in enumerate(classes)}
    elif probabilities:
        raise UserError("probabilities=true: this model gives no probabilities")
    return pd.DataFrame(answers)


@contextmanager
def _named_input(start: str = "") -> Iterator[None]:
    """Let errors about data name the keys of score."""
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix("data: ").replace("data.path", "input").replace("data.separator", "separator")
        raise UserError(text if text.startswith("input=") else start + text) from error


def _plain(column: pd.Series) -> pd.Series:
    plain = tables.plain_column(column)
    return plain.mask(np.isinf(plain)) if plain.dtype.kind == "f" else plain


def beside(rows: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The input with the answers as its last columns. An answer whose name is taken is called prediction_2, and so on."""
    names = {}
    for name in answers:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        names[name] = name if name not in rows else next(other for other in numbered if other not in rows)
    return pd.concat([rows, answers.rename(columns=names).set_axis(rows.index)], axis="columns")


def write_output(frame: pd.DataFrame, output: str, *, spreadsheet_safe: bool = False) -> None:
    """Write a whole file or leave what was there: nobody ever reads half of it. UserError where that fails.

    `spreadsheet_safe`: a CSV contains no text that a spreadsheet would run as a formula, and all text is in quotes, so
    that a spreadsheet which separates cells by semicolons does not find one in it.
    """
    if spreadsheet_safe:
        frame = escape_formulas(frame)
    # Python's writer leaves a cell with a carriage return without quotes, and readers take it for the end of a row.
    quoting = csv.QUOTE_NONNUMERIC if spreadsheet_safe or _has_return(frame) else csv.QUOTE_MINIMAL
    files, place = _place(str(output))
    try:
        if isinstance(files, LocalFileSystem):
            with tempfile.TemporaryDirectory(dir=Path(place).parent, prefix=".score-") as folder:
                whole = Path(folder, Path(place).name)
                _write(frame, whole.open("wb"), str(output), quoting)
                whole.replace(place)
        else:
            with files.transaction:  # an object appears when it is complete
                _write(frame, files.open(place, "wb"), str(output), quoting)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error}: name another place") from error


def _write(frame: pd.DataFrame, file: "fsspec.spec.AbstractBufferedFile", output: str, quoting: Any) -> None:
    with file:
        if output.lower().endswith(".csv"):
            frame.to_csv(file, index=False, quoting=quoting)
        else:
            frame.to_parquet(file, index=False)


def _has_return(frame: pd.DataFrame) -> bool:
    texts = [frame.columns.to_series(), *(column for _, column in frame.items() if column.dtype.kind not in "biufcmM")]
    return any(column.astype(str).str.contains("\r", regex=False).any() for column in texts)


def escape_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before texts, column names and categories that begin like a formula. Numbers stay."""

    def escape(value: Any) -> Any:
        is_formula = isinstance(value, str) and FORMULA.match(value) and not NUMBER.fullmatch(value)
        return f"'{value}" if is_formula else value

    columns = [
        column if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column)
        else column.astype(object).map(escape)
        for _, column in frame.items()
    ]  # fmt: skip
    escaped = pd.concat(columns, axis="columns")
    escaped.columns = [escape(name) for name in frame.columns]
    return escaped


def _place(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"output={path}: cannot be reached: {error}") from error
