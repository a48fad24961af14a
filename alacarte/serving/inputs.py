"""What the web page needs to know about a model: its inputs with an example each, its classes, and whether a row is an image."""

import math
import re
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from mlflow.types import DataType
from mlflow.types.schema import AnyType

from alacarte.serving.model import ServedModel
from alacarte.serving.rows import as_frame

PIXEL = re.compile(r"(pixel|px)_?\d+(_\d+)?", re.ASCII)
NUMBERS = ("double", "float", "long", "integer")
FULL = (1, 16, 255)  # what a full stroke is in the usual kinds of images


def describe(model: ServedModel) -> dict[str, Any]:
    """`inputs` in the order of the signature; `image` [height, width] and `range` [low, high] where a row is a square image.

    Types are MLflow's ("double", "long", "string", "boolean", "datetime", ...), "any", and "json" for what has parts.
    """
    names, specs = model.columns, model.signature.inputs.inputs
    if model.input_schema.tensor:
        types, required = [kind or "any" for kind in model.input_schema.types], [True] * len(names)
    else:
        types, required = [_type(spec.type) for spec in specs], [spec.required for spec in specs]
    frame = _example(model)
    examples = [None] * len(names) if frame is None else [_plain(frame.iloc[0, i]) for i in range(len(names))]
    side = round(len(names) ** 0.5)
    square = side > 3 and side * side == len(names) and all(PIXEL.fullmatch(name) for name in names)
    pixels = _numbers(frame) if frame is not None and square and all(kind in NUMBERS for kind in types) else None
    return {
        "task": model.task,
        "classes": model.classes,
        "inputs": [
            {"name": name, "type": kind, "required": due, "example": example}
            for name, kind, due, example in zip(names, types, required, examples, strict=True)
        ],
        "image": None if pixels is None else [side, side],
        "range": None if pixels is None else _range(pixels),
    }


def _type(kind: Any) -> str:
    if isinstance(kind, DataType):
        return kind.name
    return "any" if isinstance(kind, AnyType) else "json"


def _example(model: ServedModel) -> pd.DataFrame | None:
    """The input example with a column for each input; None where there is none, or none that is a table."""
    try:
        return None if model.example is None else as_frame(model.example, model.input_schema)
    except (TypeError, ValueError):
        return None


def _numbers(frame: pd.DataFrame) -> np.ndarray | None:
    try:
        return frame.to_numpy(dtype="float64", na_value=np.nan)
    except (TypeError, ValueError):  # an example that does not fit its signature
        return None


def _range(pixels: np.ndarray) -> list[float]:
    """From no ink to a full stroke, which the example may lack: [0, 16] where its darkest pixel is 11."""
    known = pixels[np.isfinite(pixels)]
    low, high = float(known.min(initial=0)), float(known.max(initial=0))
    if low < 0:  # scaled already: to -1..1, or by mean and deviation
        return [low, max(high, 1.0)]
    return [low, float(next((full for full in FULL if high <= full), high))]


def _plain(value: Any) -> Any:
    """A value as JSON has it; None where it is missing or has no such form."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, str | int | float | bool):
        return value
    return msgspec.to_builtins(value, enc_hook=lambda part: _plain(part) if isinstance(part, np.generic) else str(part))
