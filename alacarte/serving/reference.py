"""How `mlflow models serve` reads a body, with its own parser, and its refusals as one line that echoes nothing."""

import json
import re
from io import BytesIO, StringIO
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import scoring_server

from alacarte.serving.requests import CHARACTERS, Form, RequestError, Rows, check_rows, longest

# Cells that one request may spread over in memory. A short body can ask for far more: one long row sets the width of all.
CELLS = 20_000_000

ONE_OF = "send a JSON object with one of dataframe_split, dataframe_records, instances, inputs"
KNOWN = {
    "exactly one of the input fields": ONE_OF,
    "Ensure that input is a valid JSON": ONE_OF,
    "split format must": "dataframe_split takes data, columns and index, and no other key",
    "dataframe_split field": "dataframe_split: data must be rows as long as columns",
    "records format must": "dataframe_records must be a list of objects",
    "dataframe_records field": "dataframe_records must be a list of objects",
    "CSV": "the body is no CSV table that fits the model's signature",
    "Parquet": "the body is no Parquet file",
    "not the same": "every column must have as many values",
}


def read_as_mlflow(body: bytes, content_type: str, meta: Model, form: Form, max_rows: int) -> Rows:
    """What the scoring server of `mlflow models serve` makes of a body. RequestError for what it refuses."""
    kind = check_type(content_type)
    schema, params = meta.get_input_schema(), None
    try:
        if kind == scoring_server.CONTENT_TYPE_JSON:
            decoded = _decode(body)
            _check_size(decoded, body, max_rows)
            data, params, llm = scoring_server._parse_json_data(decoded, meta, schema)
            if isinstance(params, dict):  # MLflow ignores unknown names too, but writes them to the log
                known = {spec.name for spec in meta.get_params_schema() or ()}
                params = {name: value for name, value in params.items() if name in known} or None
            if llm:
                raise RequestError(400, "messages, prompt and input are for language models, which are not served here")
        elif kind == scoring_server.CONTENT_TYPE_CSV:
            data = scoring_server.parse_csv_input(StringIO(body.decode("utf-8")), schema)
        else:
            data = scoring_server.parse_parquet_input(_parquet(body, max_rows))
        rows = Rows(_count(data), form, data=data, params=params)
        check_rows(rows.n, max_rows)
        if (
            isinstance(data, pd.DataFrame)
            and rows.n * len(body) > CHARACTERS
            and kind != scoring_server.CONTENT_TYPE_JSON
        ):
            texts = data.select_dtypes(exclude=["number", "bool", "datetime"])
            _check_text(max((longest(texts[name]) for name in texts), default=0), rows.n)
    except RequestError:
        raise
    except Exception as error:
        raise explain(error, form) from None
    return rows


def check_type(content_type: str) -> str:
    """The media type of a Content-Type header that MLflow takes; RequestError 415 for any other."""
    kind, *parameters = [part.strip() for part in content_type.split(";")]
    if kind not in scoring_server.CONTENT_TYPES:
        raise RequestError(415, f"Content-Type must be one of {', '.join(scoring_server.CONTENT_TYPES)}")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name != "charset" or value.lower() != "utf-8":
            raise RequestError(415, "Content-Type takes no parameter but charset=utf-8")
    return kind


def explain(error: Exception, form: Form) -> RequestError:
    """A refusal of MLflow's or of the model as one line that names the column, and nothing that was sent."""
    if isinstance(error, MlflowException) and str(error).startswith("Failed to enforce") and error.__context__:
        error = MlflowException(str(error.__context__))  # the reason; around it stands all that was sent
    text = str(error)[:10_000]
    found = re.search(
        r"(?:Failed to convert column|Incompatible input types for column) (.+?)(?: to type|\. Can)", text
    )
    if found and found[1] in form.names:
        kind = form.types[form.names.index(found[1])] or "of the type in the signature"
        return RequestError(400, f"column {found[1]!r} must be {kind}")
    if found := re.search(r"Model is missing inputs \[(.*?)\]\.", text):
        missing = [name for name in form.names if repr(name) in found[1]]
        return RequestError(400, f"missing columns: {', '.join(missing[:10])}")
    if isinstance(error, MlflowException):
        for known, message in KNOWN.items():
            if known in text:
                return RequestError(400, message)
        return RequestError(400, "the input does not fit the model's signature; GET /model shows it")
    return RequestError(
        400, f"the model does not take these rows ({type(error).__name__}); GET /model shows its inputs"
    )


def _check_size(decoded: Any, body: bytes, max_rows: int) -> None:
    """Refuse, before pandas makes it, a table that takes far more memory than its body."""
    if not isinstance(decoded, dict):
        raise RequestError(400, ONE_OF)
    for table in (decoded.get(key) for key in scoring_server.SUPPORTED_FORMATS):
        columns, index = 0, 0
        if isinstance(table, dict) and "data" in table:
            columns, index = _length(table.get("columns")), _length(table.get("index"))
            table = table["data"]
        if isinstance(table, dict):
            n, width = max(map(_length, table.values()), default=0), len(table)
        else:
            items = table if isinstance(table, list) else []
            n, width = len(items), max(map(_length, items), default=0)
            if items and isinstance(items[0], dict):
                width = len(set(chain.from_iterable(item for item in items if isinstance(item, dict))))
        n, width = max(n, index), max(width, columns)
        check_rows(n, max_rows)
        if n * width > CELLS:
            raise RequestError(413, f"a request may have {CELLS} cells; send fewer rows at a time")
        if n * len(body) > CHARACTERS:  # every second part between quotes is a text, once no quote is escaped
            parts = body.replace(b"\\\\", b"__").replace(b'\\"', b"__").split(b'"')[1::2]
            _check_text(max(map(len, parts), default=0), n)


def _check_text(longest: int, n: int) -> None:
    if longest * n > CHARACTERS:
        raise RequestError(413, f"{n} rows may have texts of {CHARACTERS // n} characters; send fewer rows at a time")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else 0


def _count(data: Any) -> int:
    if isinstance(data, dict):
        return max((len(value) for value in data.values() if np.ndim(value)), default=1)
    return len(data) if isinstance(data, list | pd.DataFrame) or np.ndim(data) else 1


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except RecursionError:
        raise RequestError(400, "the body nests too deep") from None
    except ValueError:  # no JSON, no UTF-8, or a number of thousands of digits
        raise RequestError(400, "the body is no JSON in UTF-8") from None


def _parquet(body: bytes, max_rows: int) -> Any:
    """The file, once its own description says that it is not too long."""
    from pyarrow.parquet import ParquetFile

    meta = ParquetFile(BytesIO(body)).metadata
    check_rows(meta.num_rows, max_rows)
    if meta.num_rows * meta.num_columns > CELLS:
        raise RequestError(413, f"a request may have {CELLS} cells; send fewer rows at a time")
    return BytesIO(body)
