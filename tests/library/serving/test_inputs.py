"""What the page is told of a model: for every kind of signature, with an example and without."""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType, Array, Map, Object, Property
from sklearn.dummy import DummyClassifier

from alacarte.serving.description import describe
from alacarte.serving.model import Answer, ServedModel


def served(folder: Path, inputs: list, example: Any = None) -> ServedModel:
    model = DummyClassifier(strategy="constant", constant=1).fit([[0], [0]], [0, 1])
    mlflow.sklearn.save_model(
        model, folder, signature=ModelSignature(Schema(inputs), Schema([ColSpec("long")])), input_example=example,
        serialization_format="skops", pip_requirements=["scikit-learn"],
    )  # fmt: skip
    return ServedModel.load(folder, trust_code=False)


def tensor(kind: str, *shape: int, name: str | None = None) -> TensorSpec:
    return TensorSpec(np.dtype(kind), shape, name)


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize(
    ("inputs", "example", "types", "row"),
    [
        ([tensor("float64", -1, 2)], np.array([[1.5, np.nan]]), ["double"] * 2, [1.5, None]),
        ([tensor("float32", -1, 2, 2)], np.ones((3, 2, 2), "float32"), ["double"] * 4, [1, 1, 1, 1]),
        ([tensor("int64", -1, -1)], np.ones((2, 4), "int64"), ["double"], [None]),
        ([tensor("object", -1, 2)], np.array([["a", "b"]], object), ["any"] * 2, ["a", "b"]),
        ([tensor("float64", -1, 2, name="u")], {"u": np.ones((3, 2))}, ["json"], [None]),
        ([ColSpec("double"), ColSpec("string")], pd.DataFrame([[1.5, "x"]]), ["double", "string"], [1.5, "x"]),
        ([ColSpec("string")], ["a", "b"], ["string"], [None]),
        ([ColSpec("double", "a")] * 2, pd.DataFrame([[1.0, 2.0]], columns=["a", "a"]), ["double"] * 2, [1, 2]),
        (
            [ColSpec("double", "a"), ColSpec("long", "b", False), ColSpec("float", "c")],
            pd.DataFrame({"a": [1.5], "c": [np.inf]}).astype({"c": "float32"}),
            ["double", "long", "float"],
            [1.5, None, None],
        ),
        (
            [ColSpec(AnyType(), "a", False), ColSpec(AnyType(), "b", False)],
            pd.DataFrame({"a": [None], "b": [[1, {"c": "d"}]]}),
            ["any", "any"],
            [None, [1, {"c": "d"}]],
        ),
        (
            [ColSpec(Array("double"), "a"), ColSpec(Map("string"), "b"), ColSpec(Object([Property("k", "long")]), "c")],
            pd.DataFrame([{"a": [1.5, 2.0], "b": {"x": "y"}, "c": {"k": 3}}]),
            ["json"] * 3,
            [[1.5, 2.0], {"x": "y"}, {"k": 3}],
        ),
    ],
)  # fmt: skip
def test_every_signature_is_described(
    tmp_path: Path, inputs: list, example: Any, types: list, row: list, with_example: bool
):
    model = served(tmp_path / "model", inputs, example if with_example else None)
    description = describe(model)
    json.dumps(description, allow_nan=False)
    assert [column["name"] for column in description["inputs"]] == model.columns
    assert [column["type"] for column in description["inputs"]] == types
    assert [column["example"] for column in description["inputs"]] == (row if with_example else [None] * len(row))
    assert description["image"] is description["range"] is None
    if "a" in model.columns:
        assert [column["required"] for column in description["inputs"]] == [spec.required for spec in inputs]


def test_an_example_can_be_sent_back(tmp_path: Path):
    columns = {"n": "long", "s": "string", "d": "datetime", "t": "boolean", "l": Array("long"), "b": "binary"}
    values = [3, "x", pd.Timestamp("2020-05-01 10:00"), True, [1, 2], b"ab"]
    row = pd.DataFrame({name: [value] for name, value in zip(columns, values, strict=True)})
    model = served(tmp_path / "model", [ColSpec(kind, name) for name, kind in columns.items()], row)
    examples = [column["example"] for column in describe(model)["inputs"]]
    body = json.dumps({"dataframe_split": {"columns": model.columns, "data": [examples]}}).encode()
    (answer,) = model.predict([model.parse(body, "application/json", 1)])
    assert isinstance(answer, Answer), answer


@pytest.mark.parametrize(
    ("pixels", "kind", "expected"),
    [
        ([0, 16], "double", [0, 16]),
        ([0, 0.4], "float", [0, 1]),
        ([2, 11], "long", [0, 16]),
        ([17, 200], "integer", [0, 255]),
        ([0, 4095], "long", [0, 4095]),
        ([0, 0], "double", [0, 1]),
        ([7, 7], "long", [0, 16]),
        ([-1, -1], "double", [-1, 1]),
        ([-0.5, 0.25], "double", [-0.5, 1]),
        ([-0.5, 2.75], "double", [-0.5, 2.75]),
        ([np.nan, np.inf], "double", [0, 1]),
        (["0", "1"], "string", None),
        ([True, False], "boolean", None),
    ],
)
def test_range_of_an_image(tmp_path: Path, pixels: list, kind: str, expected: list | None):
    names = [f"pixel{i}" for i in range(16)]
    example = pd.DataFrame([pixels * 8], columns=names)
    example = example.astype(
        {"long": "int64", "integer": "int32", "float": "float32"}.get(kind, example.dtypes.iloc[0])
    )
    description = describe(served(tmp_path / "model", [ColSpec(kind, name) for name in names], example))
    assert description["range"] == expected
    assert description["image"] == (None if expected is None else [4, 4])


def test_what_is_no_image(tmp_path: Path):
    for i, names in enumerate(([f"pixel{i}" for i in range(15)], [f"x{i}" for i in range(16)], ["px0"])):
        example = pd.DataFrame([[1.0] * len(names)], columns=names)
        assert describe(served(tmp_path / str(i), [ColSpec("double", n) for n in names], example))["image"] is None
