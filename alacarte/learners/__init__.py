"""One interface over the frameworks: fit, update, predict, save and log, load. One file per framework.

features.py turns a table into numbers and is part of every saved model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from alacarte.errors import UserError
from alacarte.formats.frameworks import register, registered_learner

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

    from alacarte.features import Features

__all__ = ["INITS", "Learner", "OnEpoch", "Rows", "Update", "load", "register"]

OnEpoch = Callable[[int, dict[str, float]], object]
DEFAULT_LEARNER = "alacarte.learners.sklearn"  # of models that others logged
INITS = ("warm", "shrink_perturb", "scratch")  # how a retraining begins
ONWARD = 3.0  # times its learning rate a model is trained on at first; less leaves it where it is, more shakes out what it knows


@dataclass(frozen=True)
class Update:
    """What a retraining did."""

    init: str  # the one asked for, or what this family can do in its place
    epochs: int  # passes over the rows; of boosted trees, iterations
    samples_seen: int  # rows x epochs: what it cost, whatever the machine
    note: str | None = None  # why it is not what was asked for


@dataclass(frozen=True)
class Rows:
    """The rows of a training as a framework gets them."""

    inputs: Any  # (n, n_inputs)
    targets: np.ndarray  # (n,)
    weight: np.ndarray | None = None  # (n,)


class Learner(Protocol):
    @property
    def task(self) -> str:
        """ "classification" or "regression", from fit."""

    @property
    def classes(self) -> list | None:
        """The labels in the order of predict_proba's columns, as plain str, int or bool. None for regression."""

    @property
    def epochs(self) -> int:
        """Passes over the rows that the last training from scratch took; 1 where there are none. Saved with the model."""

    def fit(
        self,
        X: pd.DataFrame,
        y: pd.Series,
        X_val: pd.DataFrame,
        y_val: pd.Series,
        *,
        task: str,
        seed: int,
        features: Features = ...,
        weight: np.ndarray | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Train on X, y. X_val, y_val are for early stopping. `weight` (n,) weights the rows of X.

        on_epoch(epoch, metrics) follows a learner with epochs.
        Raises UserError for a column that is no number, bool, date or text, and for a model that cannot do `task`.
        """

    def update(
        self,
        X: pd.DataFrame,
        y: pd.Series,
        X_val: pd.DataFrame,
        y_val: pd.Series,
        *,
        init: str,
        share: float,
        shrink: float,
        seed: int,
        weight: np.ndarray | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Update:
        """Train further for `share` of the `epochs`, with the same features and classes.

        Gradient descent uses `onward_rate` times its learning rate. Only columns that vary far more than in training are
        scaled again (`features.widen`), and not for trees.
        init "warm" starts from the present weights. "shrink_perturb" starts from `shrink` of them and 1 - `shrink` of
        fresh ones (Ash and Adams, On warm-starting neural network training, 2020). "scratch" trains again with the same
        settings, all epochs, and the classes of y. A learner that cannot do this does something else and notes it.

        Raises UserError if no answer changed. The caller ensures that each label of y is one of `classes`.
        """

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        """(n,) labels, or float64 for regression. X holds the original columns, in any order; others are ignored."""

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray | None:
        """(n, n_classes) float64, or None where the model has no probabilities."""

    def save(
        self, path: Path, *, example: pd.DataFrame, metadata: dict[str, Any], mlflow_model: Model | None = None
    ) -> None:
        """Write an MLflow model folder. `example` (2 rows or more of X) becomes the input example."""

    def log(self, name: str, *, example: pd.DataFrame, metadata: dict[str, Any]) -> ModelInfo:
        """Log the model folder as a LoggedModel of the active run."""


def load(path: str | Path) -> Learner:
    """The learner in a local MLflow model folder. UserError, before anything is made, for a folder that is not safe.

    A child process tries the model first: UserError too for a model with which this process would crash or hang. Runs no
    code from the folder. scikit-learn models that others logged as skops load too.
    """
    from alacarte.formats.probe import load_safely

    cls = _learner_class(Path(path))  # imports the framework before the child process is made, which then has it too
    _, model, _ = load_safely(path)
    if hasattr(cls, "outputs") != hasattr(model, "outputs"):  # a network, or an estimator
        raise UserError(f"{path}: the model is no model of {cls.__name__}, which it names; log it again")
    return cls.of(model)


def _learner_class(folder: Path) -> Any:
    """The learner that a model names, otherwise that of scikit-learn. `load_safely` refuses what cannot be read here."""
    from alacarte.formats.load import read_description

    try:
        module = (read_description(folder).metadata or {}).get("learner", DEFAULT_LEARNER)
    except Exception:
        module = DEFAULT_LEARNER
    return registered_learner(module)


def outputs(learner: Learner, X: pd.DataFrame) -> np.ndarray:
    """All that a learner says of X, to tell whether a training changed anything."""
    proba = learner.predict_proba(X)
    return learner.predict(X) if proba is None else proba


def onward_rate(epoch: int, epochs: int) -> float:
    """By how much the learning rate is multiplied in epoch 0, 1, ... of a retraining: ONWARD at first, falling to zero.

    In so few epochs a model has to leave its minimum for what is new, and to settle again. The mean over the epoch of a
    line from ONWARD to 0 (warm restarts after Loshchilov and Hutter, SGDR, 2017, with a line for the cosine).
    """
    return ONWARD * (1 - (epoch + 0.5) / epochs)


def check_changed(before: np.ndarray, learner: Learner, X: pd.DataFrame) -> None:
    """UserError where a retraining left every output on X what it was."""
    if np.array_equal(before, outputs(learner, X)):
        raise UserError(
            "retraining changed nothing: raise retrain.epoch_fraction or model.lr, or use retrain.init=scratch"
        )


def with_answers(learner: Learner, example: pd.DataFrame, metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a saved model: what the caller says of it, and its answers on the input example, for whoever loads it."""
    return {**metadata, "learner": type(learner).__module__, "example_predictions": learner.predict(example).tolist()}


def log_model(learner: Learner, name: str, *, example: pd.DataFrame, metadata: dict[str, Any]) -> ModelInfo:
    """What each learner's `log` does: MLflow makes the LoggedModel, the learner's `save` fills its folder."""
    from mlflow.models import Model

    def save_model(path: str, mlflow_model: Model, **_: object) -> None:
        learner.save(Path(path), example=example, metadata=metadata, mlflow_model=mlflow_model)

    # MLflow would load the model once more to try the input example; the tests serve every family instead.
    flavor = SimpleNamespace(__name__="alacarte.learners", save_model=save_model)
    return Model.log(artifact_path=None, name=name, flavor=flavor, validate_serving_input=False)
