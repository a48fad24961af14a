"""Tables: read a file into a DataFrame, hash its bytes, and give its columns plain types."""

import hashlib
import logging
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pandas as pd
from fsspec.implementations.local import LocalFileSystem

from alacarte.data.csv_reader import CellRules, CsvFile, read_numbers, reading, require_numbers
from alacarte.errors import UserError, as_argument, first_line, nearest

if TYPE_CHECKING:
    import pyarrow as pa
    from mlflow.models import ModelSignature

# .csv and .tsv may be compressed; a URL may go on with ?query, and a chain of file systems with ::
SUFFIX = re.compile(r"\.(?:((?:csv|tsv)(?:\.(?:gz|bz2|xz|zip))?)|parquet|pq)/?(?=$|\?|::)", re.IGNORECASE)
FORMATS = ".csv, .tsv (plain, .gz, .bz2, .xz or .zip), .parquet or .pq"

logger = logging.getLogger(__name__)


def read_table(
    path: str,
    separator: str | None = None,
    missing: Sequence[str] | None = None,
    decimal: str | None = None,
    text: Sequence[str] = (),
    numbers: Sequence[str] = (),
) -> pd.DataFrame:
    """Read CSV or Parquet, the latter also as a folder of files. docs/data.md explains the arguments.

    `path` is local (relative to the working directory) or any URL that fsspec knows: s3://, gs://, abfs://, https://.
    A column without a name at the head of a CSV and an index without a name in Parquet only number the rows and are left
    out; an index with a name becomes a column.

    Raises UserError that names `data.path` when there is no such file, or one that cannot be read.
    """
    return open_table(path, separator).typed(CellRules(missing, decimal, text, numbers))


def open_table(path: str, separator: str | None = None) -> "CsvFile | ParquetFile":
    """Read the content of a file once. `as_written` gives it to an output, and `typed` to a model."""
    path = str(path)  # a name of digits arrives as a number
    files, place = _locate(path)
    suffix = SUFFIX.search(path)
    with reading(path):
        if suffix and suffix[1]:
            with files.open(place, "rb", compression="infer") as file:
                content = file.read()
            default = "\t" if suffix[1].lower().startswith("tsv") else ","
            return CsvFile(path, content, {r"\t": "\t", "tab": "\t"}.get(str(separator), separator or default))
        if not suffix and not any(SUFFIX.search(file) for file in _files_under(files, place)):
            raise UserError(f"data.path={path}: the name must end in {FORMATS}: rename or convert it")
        import pyarrow.parquet

        return ParquetFile(path, pyarrow.parquet.read_table(place, filesystem=files))


@dataclass(frozen=True)
class ParquetFile:
    """The content of Parquet files."""

    path: str
    table: "pa.Table"

    @property
    def columns(self) -> list[str]:
        return self.table.column_names

    def as_written(self) -> pd.DataFrame:
        """All columns in the types of the file."""
        frame = self.table.replace_schema_metadata(None).to_pandas(types_mapper=pd.ArrowDtype)
        return frame.drop(columns=[name for name in frame if str(name).startswith("__index_level_")])

    def typed(self, rules: CellRules, only: Sequence[str] | None = None) -> pd.DataFrame:
        """The columns as pandas has them, except for what the rules say. `only` gives these columns, without warnings."""
        with reading(self.path):
            frame = self.table.to_pandas()
        named = [level for level in frame.index.names if level is not None]
        frame = frame.reset_index(level=named) if named else frame
        frame = convert(frame if only is None else frame[list(only)], rules)
        texts = frame.columns[frame.dtypes == "str"].difference(list(rules.text)) if only is None else []
        if stored := [str(name) for name in texts if read_numbers(frame[name], rules.decimal)[0].dtype != "str"]:
            choice = (
                f"{as_argument('data.numbers', stored)} reads numbers, {as_argument('data.text', stored)} reads text"
            )
            logger.warning("data.path=%s: text that consists of numbers is read as text: %s", self.path, choice)
        return frame


def convert(frame: pd.DataFrame, rules: CellRules) -> pd.DataFrame:
    """The table with columns of text and of numbers, and with missing values, as the rules say."""
    columns = {}
    for name, column in frame.items():
        column = _plain_text(column.astype(object)) if name in rules.text and column.dtype != "str" else column
        if rules.missing and column.dtype == "str":
            column = column.mask(column.isin(list(rules.missing)))
        elif rules.missing and pd.api.types.is_numeric_dtype(column):
            column = column.mask(column.isin(pd.to_numeric(pd.Series(rules.missing), errors="coerce").dropna()))
        if name in rules.numbers and column.dtype == "str":
            column = read_numbers(column, rules.decimal)[0]
            require_numbers(column)
        columns[name] = column
    return pd.DataFrame(columns, index=frame.index)


def column_types(signature: "ModelSignature | None", target: str | None = None) -> dict[str, str]:
    """Column -> type of the inputs that a model signature names, "double", "string", ... or "any"; and of the target."""
    schema = signature.inputs if signature else None
    if not schema or not schema.has_input_names():
        return {}
    types = {str(spec.name): getattr(spec.type, "name", None) or "any" for spec in schema.inputs}
    if target and signature and signature.outputs:
        types[target] = getattr(signature.outputs.inputs[0].type, "name", None) or "any"
    return types


def stem(path: str) -> str:
    """The name of a file without its suffix."""
    return PurePath(SUFFIX.split(path)[0]).name


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
        raise UserError(f"data.path={path}: cannot be read: {first_line(error)}") from error
    return digest.hexdigest()


def absolute(path: str) -> str:
    """A local path from the root, whatever the working directory will be; a URL as it is."""
    return fsspec.core.url_to_fs(path)[1] if fsspec.utils.get_protocol(path) == "file" else path


def _locate(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL and the place in it, where there must be something."""
    try:
        files, place = fsspec.core.url_to_fs(path)
        exists = files.exists(place)
    except Exception as error:  # an unknown protocol, a package that is not installed, no permission, no network
        raise UserError(f"data.path={path}: cannot be reached: {first_line(error)}") from error
    if exists:
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


def plain_column(column: pd.Series) -> pd.Series:
    """The same values in a type that a model signature can express.

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
            f"with {as_argument('data.drop', [str(column.name)])}"
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
    """The rows `inputs` (n,) with the columns of `X`, in its order and types. A column that `inputs` lacks is missing values.

    A date may have another unit than in `X`.
    """
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
