"""What the web page needs to know about a model: its inputs with an example each, its classes, and whether a row is an image."""

import re
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from mlflow.types import DataType
from mlflow.types.schema import AnyType

from alacarte.serving.model import ServedModel
from alacarte.serving.rows import as_frame, as_numbers, to_python

PIXEL = re.compile(r"(pixel|px)_?\d+(_\d+)?", re.ASCII)
NUMBERS = ("double", "float", "long", "integer")
FULL_STROKES = (1, 16, 255)  # the darkest value in the usual kinds of images


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
