"""What the server tells about its model: `/model` for the web page, `/openapi.json` for /docs, tensors for /v2."""

import copy
import re
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from fastapi import FastAPI
from mlflow.types import DataType, Schema, TensorSpec
from mlflow.types.schema import AnyType

from alacarte.serving.model import ServedModel
from alacarte.serving.rows import as_frame, as_numbers, to_python

PIXEL = re.compile(r"(pixel|px)_?\d+(_\d+)?", re.ASCII)
NUMBERS = ("double", "float", "long", "integer")
FULL_STROKES = (1, 16, 255)  # the darkest value in the usual kinds of images

JSON_TYPES = {
    "double": "number", "float": "number", "long": "integer", "integer": "integer", "boolean": "boolean",
    "string": "string", "datetime": "string",
}  # fmt: skip
TABLE = {
    "type": "object",
    "description": "One of the first four, as `mlflow models serve` takes them.",
    "properties": {
        "dataframe_split": {"type": "object", "required": ["data"]},
        "dataframe_records": {"type": "array", "items": {"type": "object"}},
        "instances": {"type": "array", "items": {}},
        "inputs": {},
        "params": {"type": "object"},
    },
}
TENSORS = {
    "type": "object",
    "description": "`outputs` may name predictions, prediction_ids and probabilities.",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": {"type": "object", "required": ["name", "shape", "datatype", "data"]}},
        "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
    },
}


def describe(model: ServedModel) -> dict[str, Any]:
    """`inputs` in the order of the signature; `image` [height, width] and `range` [low, high] if a row is a square image.

    Types are MLflow's ("double", "long", "string", "boolean", "datetime", ...), "any", and "json" for nested types.
    """
    schema, specs, n = model.input_schema, model.signature.inputs.inputs, len(model.columns)
    types = [kind or "any" for kind in schema.types] if schema.tensor else [_type_name(spec.type) for spec in specs]
    required = [True] * n if schema.tensor else [spec.required for spec in specs]
    frame = _example(model)
    examples = [None] * n if frame is None else [_as_json(column) for _, column in frame[:1].items()]
    side = round(n**0.5)
    is_image = side > 3 and side * side == n and all(map(PIXEL.fullmatch, model.columns)) and set(types) <= {*NUMBERS}
    pixels = as_numbers(frame) if is_image and frame is not None else None
    fields = zip(model.columns, types, required, examples, strict=True)
    return {
        "task": model.task,
        "classes": model.classes,
        "inputs": [dict(zip(("name", "type", "required", "example"), values, strict=True)) for values in fields],
        "image": None if pixels is None else [side, side],
        "range": None if pixels is None else _range(pixels),
    }


def _type_name(kind: Any) -> str:
    if isinstance(kind, DataType):
        return kind.name
    return "any" if isinstance(kind, AnyType) else "json"


def _example(model: ServedModel) -> pd.DataFrame | None:
    """The input example with a column for each input; None without an example, or with one that is no table."""
    try:
        return None if model.example is None else as_frame(model.example, model.input_schema)
    except (TypeError, ValueError):
        return None


def _as_json(column: pd.Series) -> Any:
    """The first value as JSON has it; None if it is missing or has no such form."""
    to_list = lambda value: value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)  # noqa: E731
    return msgspec.json.decode(msgspec.json.encode(to_python(column)[0], enc_hook=to_list))


def _range(pixels: np.ndarray) -> list[float]:
    """From no ink to a full stroke, which the example may lack: [0, 16] if its darkest pixel is 11."""
    finite = pixels[np.isfinite(pixels)]
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    if low < 0:  # scaled already: to -1..1, or by mean and deviation
        return [low, max(high, 1.0)]
    return [low, float(next((stroke for stroke in FULL_STROKES if high <= stroke), high))]


# --- /openapi.json ---


def json_body(schema: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    """The description of a body that a route reads by itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}, **others}}}


def describe_model(api: FastAPI, model: ServedModel) -> dict[str, Any]:
    """/openapi.json with the columns and an example of a model. Only for callers who may use it."""
    description = copy.deepcopy(api.openapi())  # FastAPI keeps its own
    bodies = {
        path: operations["post"]["requestBody"]["content"]["application/json"]
        for path, operations in description["paths"].items()
        if path.endswith(("/invocations", "/infer"))
    }
    inputs, tensors = describe(model)["inputs"], describe_tensors(model.signature.inputs)
    record = bodies["/invocations"]["schema"]["properties"]["dataframe_records"]["items"]
    record["properties"] = {column["name"]: _json_schema(column["type"]) for column in inputs}
    record["required"] = [column["name"] for column in inputs if column["required"]]
    if isinstance(model.example, np.ndarray):
        shape, cells = [1, *model.example.shape[1:]], [model.example[0].ravel().tolist()]
        table: dict[str, Any] = {"instances": model.example[:1].tolist()}
    else:
        shape, cells = [1], [[column["example"]] for column in inputs]
        names, row = [column["name"] for column in inputs], [column["example"] for column in inputs]
        table = {"dataframe_split": {"columns": names, "data": [row]}}
    filled = [{**tensor, "shape": shape, "data": data} for tensor, data in zip(tensors, cells, strict=True)]
    for path, body in bodies.items():
        body["example"] = {"inputs": filled} if path.endswith("/infer") else table
    return description


def _json_schema(column_type: str) -> dict[str, Any]:
    kind = JSON_TYPES.get(column_type)
    return {"type": [kind, "null"]} if kind else {}


# --- the tensors of the Open Inference Protocol ---


def describe_tensors(schema: Schema) -> list[dict[str, Any]]:
    """Name, datatype and shape of each input or output of a model."""
    tensors = []
    for i, spec in enumerate(schema.inputs):
        if isinstance(spec, TensorSpec):
            numpy_type, shape = spec.type, list(spec.shape)
        else:
            numpy_type, shape = spec.type.to_numpy() if isinstance(spec.type, DataType) else np.dtype(object), [-1]
        tensors.append({"name": spec.name or f"input-{i}", "datatype": datatype_of(numpy_type), "shape": shape})
    return tensors


def datatype_of(numpy_type: np.dtype) -> str:
    prefix = {"i": "INT", "u": "UINT", "f": "FP"}.get(numpy_type.kind)
    return f"{prefix}{8 * numpy_type.itemsize}" if prefix else "BOOL" if numpy_type.kind == "b" else "BYTES"
