"""The models that the page is tested with, registered for real: a table of every type with names like HTML, images, numbers."""

from typing import Any

import mlflow
import numpy as np
import pandas as pd
from conftest import Project, tracking
from mlflow import MlflowClient
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import AnyType
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from project.data import load_digits

SCRIPT = '<script>document.title="owned"</script>'
# Of the model "table": its classes, and its columns, of type double, long, string, any, boolean, datetime and double.
CLASSES = ["", SCRIPT, "say \"a\" & 'b'", "été 東京 🦊"]
TYPES = ["double", "long", "string", AnyType(), "boolean", "datetime", "double"]
EXAMPLE = {
    "area": 71.25, "rooms": 3, SCRIPT: SCRIPT, "\"quoted\", 'too' &amp; <b>": "red", "été 東京": True,
    "built": "2020-05-01T10:00:00", "__proto__": None,
}  # fmt: skip


def table() -> tuple[Any, pd.DataFrame, ModelSignature]:
    """Always the class SCRIPT. All columns but the first two are optional."""
    X = pd.DataFrame([EXAMPLE, EXAMPLE]).astype({"built": "datetime64[ns]", "__proto__": float, "été 東京": object})
    X.iloc[1, 2:] = None
    model = DummyClassifier(strategy="constant", constant=SCRIPT).fit(np.zeros((4, 1)), CLASSES)
    columns = [ColSpec(kind, name, i < 2) for i, (name, kind) in enumerate(zip(X, TYPES, strict=True))]
    return model, X, ModelSignature(Schema(columns), Schema([ColSpec("string")]))


def digits() -> tuple[Any, pd.DataFrame, ModelSignature]:
    """Handwritten digits, 8x8 images."""
    frame = load_digits()
    X, y = frame.drop(columns="digit"), frame["digit"]
    return KNeighborsClassifier(9, weights="distance").fit(X, y), X[:3], infer_signature(X, y.to_numpy())


def houses() -> tuple[Any, pd.DataFrame, ModelSignature]:
    """A regression on 40 columns, x0 to x39."""
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 40)), columns=[f"x{i}" for i in range(40)])
    y = X.sum(axis=1)
    return LinearRegression().fit(X, y), X[:3], infer_signature(X, y.to_numpy())


KINDS = {"table": table, "digits": digits, "houses": houses}


def register(project: Project, kind: str) -> None:
    """Register a model of this kind under its name, as champion."""
    from alacarte import formats  # noqa: F401  # lets skops hold pandas.NA

    with threadpool_limits(1):  # several threads wait for each other on a busy machine
        model, rows, signature = KINDS[kind]()
    with tracking(project.uri):
        info = mlflow.sklearn.log_model(
            model, name="model", signature=signature, input_example=rows, serialization_format="skops",
            pip_requirements=["scikit-learn"], registered_model_name=kind,
        )  # fmt: skip
    version = str(info.registered_model_version)
    MlflowClient(project.uri).set_registered_model_alias(kind, "champion", version)
