"""Tables: read a file into a DataFrame, hash its bytes, and give its columns plain types."""

import csv
import difflib
import hashlib
import io
import logging
import numbers
import re
import warnings
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from fsspec.implementations.local import LocalFileSystem

from alacarte.errors import UserError

# .csv and .tsv may be compressed; a URL may go on with ?query, and a chain of file systems with ::
SUFFIX = re.compile(r"\.(?:((?:csv|tsv)(?:\.(?:gz|bz2|xz|zip))?)|parquet|pq)/?(?=$|\?|::)", re.IGNORECASE)
# what a CSV means by a missing value: pandas' own list
MISSING = [
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "-1.#IND",
    "-1.#QNAN",
    "-NaN",
    "-nan",
    "1.#IND",
    "1.#QNAN",
    "<NA>",
    "N/A",
    "NA",
]
MISSING += ["NULL", "NaN", "None", "n/a", "nan", "null"]
FORMATS = ".csv, .tsv (plain, .gz, .bz2, .xz or .zip), .parquet or .pq"

logger = logging.getLogger(__name__)


def read_table(path: str, separator: str | None = None) -> pd.DataFrame:
    """Read CSV or Parquet, the latter also as a folder of files.

    `path` is local (relative to the working directory) or any URL that fsspec knows: s3://, gs://, abfs://, https://.
    `separator` is for CSV; None is a comma, or a tab for .tsv. Dates in CSV stay text. A column without a name at the
    head of a CSV and an index without a name in Parquet only number the rows and are left out; an index with a name
    becomes a column.

    Raises UserError that names `data.path` when there is no such file, or one that cannot be read.
    """
    path = str(path)  # a name of digits arrives as a number
    files, place = _locate(path)
    try:
        suffix = SUFFIX.search(path)
        if suffix and suffix[1]:
            with files.open(place, "rb", compression="infer") as file:
                content = file.read()
            return _read_csv(path, content, separator or ("\t" if suffix[1].lower().startswith("tsv") else ","))
        if not suffix and not any(SUFFIX.search(file) for file in _files_under(files, place)):
            raise UserError(f"data.path={path}: the name must end in {FORMATS}: rename or convert it")
        frame = pd.read_parquet(place, filesystem=files)
    except UserError:
        raise
    except Exception as error:  # each format and each file system has its own kinds
        mend = "is it CSV in UTF-8, or Parquet, as its name says?"
        raise UserError(f"data.path={path}: cannot be read: {_one_line(error)}: {mend}") from error
    named = [level for level in frame.index.names if level is not None]
    return frame.reset_index(level=named) if named else frame


def _read_csv(path: str, content: bytes, separator: str) -> pd.DataFrame:
    head = content.lstrip(b"\r\n").partition(b"\n")[0].decode("utf-8-sig").rstrip("\r")
    header = next(csv.reader([head], delimiter=separator), [])
    if not any(header):
        raise UserError(f"data.path={path}: the file is empty: give one with a header and rows")
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"data.path={path}: the header has {', '.join(twice)} more than once: rename the columns")
    if len(header) == 1 and (other := re.search(r"[;\t|,]", header[0])):
        raise UserError(f"data.path={path}: reads as one column, {head!r}: set data.separator={other[0]!r}")
    # low_memory would type a column by chunks, and mix numbers with text
    settings: dict[str, Any] = {"index_col": False, "low_memory": False, "keep_default_na": False, "na_values": MISSING}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(io.BytesIO(content), sep=separator, **settings)
    except pd.errors.ParserWarning:
        mend = f"name every column, and quote text with {separator!r} in it"
        raise UserError(f"data.path={path}: a row has more fields than the header, {len(header)}: {mend}") from None
    for column in frame.columns[frame.dtypes == "str"]:  # pandas forgets missing among integers of 2**63 to 2**64
        frame[column] = frame[column].mask(frame[column].isin(MISSING))
    if header[0] == "":
        logger.warning("data.path=%s: the first column has no name; it is taken for row numbers and left out", path)
        frame = frame.drop(columns=frame.columns[0])
    return frame


def path_digest(path: str) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it; of a folder's file names, sizes and bytes. Parses nothing."""
    files, place = _locate(path)
    digest = hashlib.sha256()
    try:
        names = _files_under(files, place)
        for name in names:
            if names != [place]:
                digest.update(f"{name.removeprefix(place)}\0{files.size(name)}\0".encode())
            with files.open(name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except Exception as error:
        raise UserError(f"data.path={path}: cannot be read: {_one_line(error)}") from error
    return digest.hexdigest()


def absolute(path: str) -> str:
    """A local path from the root, whatever the working directory will be; a URL as it is."""
    return fsspec.core.url_to_fs(path)[1] if fsspec.utils.get_protocol(path) == "file" else path


def _locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL and the place in it, where there must be something."""
    try:
        files, place = fsspec.core.url_to_fs(path)
        found = files.exists(place)
    except Exception as error:  # an unknown protocol, a package that is not installed, no permission, no network
        raise UserError(f"data.path={path}: cannot be reached: {_one_line(error)}") from error
    if found:
        return files, place
    hint = "check the name, and that you may read it"
    if isinstance(files, LocalFileSystem):
        folder = Path(place).parent
        hint = "nor is its folder there"
        if folder.is_dir():
            hint = nearest(Path(place).name, [file.name for file in folder.iterdir() if SUFFIX.search(file.name)])
    raise UserError(f"data.path={path}: no such file ({place}): {hint}")


def _files_under(files: fsspec.AbstractFileSystem, place: str) -> list[str]:
    return [place] if files.isfile(place) else sorted(files.find(place))


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'label'?` when a choice is near, else what there is."""
    folded = {choice.strip().lower(): choice for choice in choices}
    if near := difflib.get_close_matches(name.strip().lower(), folded, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(repr(folded[match]) for match in near)}?"
    more = f" and {len(folded) - 10} more" if len(folded) > 10 else ""
    return f"there is {', '.join(list(folded.values())[:10]) or 'nothing like it'}{more}"


def plain_column(column: pd.Series) -> pd.Series:
    """The same values in a type that a model signature can express, whatever type the file or the loader chose.

    Whole numbers become int64, or float64 where one is missing or too large; other numbers and decimals float64; durations
    float64 seconds; booleans bool, or object of True, False and None where one is missing; dates datetime64[ns] in UTC
    without a zone; text, and text mixed with numbers, str. Categories become their values, but categories of numbers
    stay a category. Missing is NaN, NaT, or None among booleans. UserError for anything else, such as lists or bytes.
    """
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype) and pd.api.types.is_any_real_numeric_dtype(dtype.categories):
        return column
    if dtype == "bool" or dtype == "str":
        return column
    if isinstance(dtype, np.dtype) and dtype.kind in "iuf":
        return _plain_number(column, whole=dtype.kind != "f")
    if dtype.kind == "M":
        return _plain_date(column)
    values = column.astype(object).where(column.notna(), None)
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind == "boolean":
        return values if values.isna().any() else values.astype("bool")
    if kind in ("integer", "floating", "mixed-integer-float", "decimal", "empty"):
        return _plain_number(values, whole=kind == "integer" and values.notna().all())
    if kind in ("date", "datetime", "datetime64"):
        return _plain_date(values)
    if kind == "timedelta":
        return pd.to_timedelta(values).dt.total_seconds()
    odd = [value for value in values.dropna() if not isinstance(value, str | numbers.Real | Decimal | np.bool)]
    if odd:
        raise UserError(
            f"column {column.name!r} holds {type(odd[0]).__name__} values: make them numbers or text, or leave it out "
            f"with data.drop=['{column.name}']"
        )
    return _plain_text(values)


def _plain_number(column: pd.Series, whole: bool) -> pd.Series:
    limit = np.iinfo(np.int64)
    fits = whole and (column.empty or (column.min() >= limit.min and column.max() <= limit.max))
    try:
        return column.astype("int64" if fits else "float64")
    except OverflowError:  # integers of more than 308 digits, so they are names
        return _plain_text(column)


def _plain_date(column: pd.Series) -> pd.Series:
    dates = pd.to_datetime(column, utc=True).dt.tz_localize(None)
    inside = dates.between(pd.Timestamp.min, pd.Timestamp.max)
    if far := int((dates.notna() & ~inside).sum()):  # models get dates in nanoseconds from MLflow, which end there
        logger.warning("column %r: %d dates before 1678 or after 2261 count as missing", column.name, far)
    return dates.where(inside).astype("datetime64[ns]")


def _plain_text(column: pd.Series) -> pd.Series:
    return column.map(str, na_action="ignore").astype("str")


def align_columns(inputs: pd.DataFrame, X: pd.DataFrame) -> pd.DataFrame:
    """The rows `inputs` (n,) with the columns of `X`, in its order and types. A column that `inputs` lacks is missing values."""
    columns = {}
    for name, known in X.items():
        values = inputs[name] if name in inputs else pd.Series(None, index=inputs.index, dtype=object)
        columns[name] = _as_type(values, known.dtype)
    return pd.DataFrame(columns, index=inputs.index)


def _as_type(values: pd.Series, dtype: Any) -> pd.Series:
    if isinstance(dtype, pd.CategoricalDtype):
        dtype = dtype.categories.dtype
    if pd.api.types.is_datetime64_any_dtype(dtype):
        return pd.to_datetime(values, errors="coerce", utc=True, format="ISO8601").dt.tz_localize(None)
    if pd.api.types.is_object_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):  # booleans, some missing
        return values.map({True: True, False: False, "true": True, "false": False}).astype(object)
    if pd.api.types.is_numeric_dtype(dtype):
        numbers = pd.to_numeric(values, errors="coerce").astype("float64")
        return numbers.mask(np.isinf(numbers))
    return values.astype(object).where(values.notna(), None).astype("str")
