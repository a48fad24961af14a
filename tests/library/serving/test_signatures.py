"""Which versions may take over from which, by their signatures."""

import numpy as np
import pytest
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ColSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType
from registries import X

from alacarte.serving.signatures import objection


def columns(*specs: ColSpec | TensorSpec, output: str = "double") -> ModelSignature:
    return ModelSignature(Schema(list(specs)), Schema([ColSpec(output)]))


A = ColSpec("double", "a")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (columns(A), columns(A), None),
        (columns(A), columns(ColSpec("double", "a", required=False)), None),
        (columns(ColSpec("double", "a", required=False)), columns(A), "input a is required, was optional"),
        (columns(A, ColSpec("string", "b")), columns(ColSpec("string", "b"), A), None),
        (columns(A, ColSpec("string", "b")), columns(A), None),  # MLflow ignores columns that a model does not know
        (columns(A), columns(A, ColSpec("string", "b")), "input b is required and new"),
        (columns(A), columns(A, ColSpec("string", "b", required=False)), None),
        (columns(A), columns(ColSpec("string", "a", required=False)), "input a is string, was double"),
        (columns(ColSpec("long", "a")), columns(A), None),
        (columns(A), columns(ColSpec("long", "a")), "input a is long, was double"),
        (columns(A), columns(ColSpec(AnyType(), "a")), "input a is Any, was double"),
        (columns(ColSpec("double"), ColSpec("double")), columns(ColSpec("double")), "1 inputs, was 2"),
        (columns(A, output="long"), columns(A, output="integer"), None),
        (columns(A, output="long"), columns(A, output="string"), "output 1 is string, was integer"),
        (columns(A), ModelSignature(Schema([A]), None), "0 outputs, was 1"),
        (ModelSignature(Schema([A]), None), columns(A), None),
        (columns(TensorSpec(np.dtype("f4"), (-1, 4))), columns(TensorSpec(np.dtype("f4"), (-1, -1))), None),
        (columns(TensorSpec(np.dtype("f4"), (-1, 4))), columns(TensorSpec(np.dtype("f4"), (-1, 5))), "(-1, 5), was a tensor"),
        (columns(TensorSpec(np.dtype("f4"), (-1, 4))), columns(TensorSpec(np.dtype("f8"), (-1, 4))), "float64"),
        (columns(A), columns(TensorSpec(np.dtype("f8"), (-1, 1))), "is required and new"),
    ],
)  # fmt: skip
def test_signatures(old: ModelSignature, new: ModelSignature, says: str | None):
    matches = objection(old, new)
    assert matches is None if says is None else says in matches, matches


def test_a_parameter_may_not_change_its_type():
    old, new = (infer_signature(X, [1], params={"k": value}) for value in (1, "one"))
    assert objection(old, new) == ("another signature than the version that serves: parameter k is string, was long")
