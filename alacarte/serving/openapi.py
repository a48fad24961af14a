"""The description of the routes for /docs: /openapi.json with the columns of the served model and an example that works."""

import copy
from typing import Any

import numpy as np
from fastapi import FastAPI
from mlflow.types import DataType, Schema, TensorSpec

from alacarte.serving.inputs import describe
from alacarte.serving.model import ServedModel

JSON_TYPES = {
    "double": "number", "float": "number", "long": "integer", "integer": "integer", "boolean": "boolean",
    "string": "string", "datetime": "string",
}  # fmt: skip
TABLE = {
    "type": "object",
    "description": "One of the four, as `mlflow models serve` takes them.",
    "properties": {
        "dataframe_split": {
            "type": "object",
            "required": ["data"],
            "properties": {
                "columns": {"type": "array", "items": {"type": "string"}},
                "data": {"type": "array", "items": {"type": "array", "items": {}}},
            },
        },
        "dataframe_records": {"type": "array", "items": {"type": "object"}},
        "instances": {"type": "array", "items": {}},
        "inputs": {},
        "params": {"type": "object"},
    },
}
TENSORS = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype", "data"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "datatype": {"type": "string"},
                    "data": {"type": "array", "items": {}},
                },
            },
        },
        "outputs": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
    },
}


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
    inputs = describe(model)["inputs"]
    record = bodies["/invocations"]["schema"]["properties"]["dataframe_records"]["items"]
    record["properties"] = {column["name"]: _json_schema(column["type"]) for column in inputs}
    record["required"] = [column["name"] for column in inputs if column["required"]]
    for path, body in bodies.items():
        body["example"] = _example_tensors(model) if path.endswith("/infer") else _example_table(model)
    return description


def _json_schema(column_type: str) -> dict[str, Any]:
    kind = JSON_TYPES.get(column_type)
    return {"type": [kind, "null"]} if kind else {}


def _example_table(model: ServedModel) -> dict[str, Any]:
    if isinstance(model.example, np.ndarray):
        return {"instances": model.example[:1].tolist()}
    inputs = describe(model)["inputs"]
    columns = [column["name"] for column in inputs]
    return {"dataframe_split": {"columns": columns, "data": [[column["example"] for column in inputs]]}}


def _example_tensors(model: ServedModel) -> dict[str, Any]:
    tensors = describe_tensors(model.signature.inputs)
    if isinstance(model.example, np.ndarray):
        shape, data = [1, *model.example.shape[1:]], [model.example[0].ravel().tolist()]
    else:
        shape, data = [1], [[column["example"]] for column in describe(model)["inputs"]]
    return {
        "inputs": [{**tensor, "shape": shape, "data": values} for tensor, values in zip(tensors, data, strict=True)]
    }


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
