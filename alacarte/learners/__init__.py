"""One interface over the frameworks: fit, update, predict, save and log, load. One file per framework.

features.py turns a table into numbers and is part of every saved model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from alacarte.errors import UserError
from alacarte.features import TABULAR, Features, threads_for, unfitted
from alacarte.formats.frameworks import register, registered_learner

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

__all__ = ["INITS", "Learner", "OnEpoch", "Rows", "TrainingData", "Update", "load", "register"]

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


@dataclass(frozen=True)
class TrainingData:
    """The arguments of `fit` and `update` that say what a training sees."""

    X: pd.DataFrame
    y: pd.Series
    X_val: pd.DataFrame
    y_val: pd.Series
    seed: int
    weight: np.ndarray | None
    on_epoch: OnEpoch | None
    val_weight: np.ndarray | None


class Learner(ABC):
    """A model that can be trained. X holds the original columns, in any order; other columns are ignored."""

    packages: tuple[str, ...] = ()  # what a model needs beside scikit-learn, pinned in its requirements

    @property
    @abstractmethod
    def task(self) -> str:
        """ "classification" or "regression", from fit."""

    @property
    @abstractmethod
    def classes(self) -> list | None:
        """The labels in the order of predict_proba's columns, as plain str, int or bool. None for regression."""

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Passes over the rows that the last training from scratch took; 1 where there are none. Saved with the model."""

    @abstractmethod
    def transformer(self) -> Any:
        """The fitted features of the model. None: the model takes the original columns."""

    @abstractmethod
    def predict(self, X: pd.DataFrame) -> np.ndarray:
        """(n,) labels, or float64 for regression."""

    @abstractmethod
    def predict_proba(self, X: pd.DataFrame) -> np.ndarray | None:
        """(n, n_classes) float64, or None where the model has no probabilities."""

    @abstractmethod
    def save(
        self, path: Path, *, example: pd.DataFrame, metadata: dict[str, Any], mlflow_model: Model | None = None
    ) -> None:
        """Write an MLflow model folder. `example` (2 rows or more of X) becomes the input example."""

    @abstractmethod
    def fit_from_scratch(self, data: TrainingData, task: str, features: Features) -> None:
        """Fit the features and the model."""

    @abstractmethod
    def fit_further(self, data: TrainingData, epochs: int) -> int:
        """Train the present model for at most `epochs` epochs. Return the number of epochs.

        Gradient descent uses `onward_rate` times its learning rate. The features stay as they are, except columns that vary
        far more than in training, which are scaled again (`features.widen`).
        """

    def reason_for_scratch(self, y: pd.Series) -> str | None:
        """Why the model cannot be trained further with the labels y, as a sentence. None: it can."""
        return None

    def start_over(self, seed: int) -> None:  # noqa: B027  # most learners keep nothing for it
        """Prepare for a training from scratch with the settings of the present model."""

    def shrink_perturb(self, shrink: float, seed: int) -> str | None:
        """Mix the weights with fresh ones. Otherwise return a note."""
        return f"shrink_perturb is for networks in torch and Keras: {type(self).__name__} starts warm"

    def fit(
        self,
        X: pd.DataFrame,
        y: pd.Series,
        X_val: pd.DataFrame,
        y_val: pd.Series,
        *,
        task: str,
        seed: int,
        features: Features = TABULAR,
        weight: np.ndarray | None = None,
        val_weight: np.ndarray | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """Train on X, y. X_val, y_val are for early stopping. `weight` (n,) weights the rows of X, `val_weight` those of X_val.

        on_epoch(epoch, metrics) follows a learner with epochs.
        Raises UserError for a column that is no number, bool, date or text, and for a model that cannot do `task`.
        """
        if X.shape[1] == 0:
            raise UserError("data: no input column is left beside the target; allowed is one or more")
        with threads_for(X):
            self.fit_from_scratch(TrainingData(X, y, X_val, y_val, seed, weight, on_epoch, val_weight), task, features)

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
        val_weight: np.ndarray | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Update:
        """Train further for `share` of the `epochs`, with the same features and classes.

        init "warm" starts from the present weights. "shrink_perturb" starts from `shrink` of them and 1 - `shrink` of
        fresh ones (Ash and Adams, On warm-starting neural network training, 2020). "scratch" trains again with the same
        settings, all epochs, and the classes of y. A learner that cannot do this does something else and notes it.

        Raises UserError if no answer changed. The caller ensures that each label of y is one of `classes`.
        """
        data = TrainingData(X, y, X_val, y_val, seed, weight, on_epoch, val_weight)
        note = None if init == "scratch" else self.reason_for_scratch(y)
        if note or init == "scratch":
            self.start_over(seed)
            with threads_for(X):
                self.fit_from_scratch(data, self.task, unfitted(self.transformer()))
            return Update("scratch", self.epochs, self.epochs * len(X), note)
        assert self.classes is None or set(y.tolist()) <= set(self.classes), "labels of unknown classes are kept out"
        before = self._all_answers(X)
        if init == "shrink_perturb":
            note = self.shrink_perturb(shrink, seed)
        with threads_for(X):
            epochs = self.fit_further(data, max(1, int(share * self.epochs)))
        if np.array_equal(before, self._all_answers(X)):
            raise UserError("retraining changed nothing: raise retrain.epoch_fraction, or use retrain.init=scratch")
        return Update("warm" if note else init, epochs, epochs * len(X), note)

    def _all_answers(self, X: pd.DataFrame) -> np.ndarray:
        proba = self.predict_proba(X)
        return self.predict(X) if proba is None else proba

    def describe_answers(self, example: pd.DataFrame) -> dict[str, Any]:
        """A part of a saved model's metadata: its answers on the input example, for the process that loads it."""
        return {"learner": type(self).__module__, "example_predictions": self.predict(example).tolist()}

    def log(self, name: str, *, example: pd.DataFrame, metadata: dict[str, Any]) -> ModelInfo:
        """Log the model folder as a LoggedModel of the active run: MLflow makes it, `save` fills its folder."""
        from mlflow.models import Model

        def save_model(path: str, mlflow_model: Model, **_: object) -> None:
            self.save(Path(path), example=example, metadata=metadata, mlflow_model=mlflow_model)

        # MLflow would load the model once more to try the input example; the tests serve every family instead.
        flavor = SimpleNamespace(__name__="alacarte.learners", save_model=save_model)
        return Model.log(artifact_path=None, name=name, flavor=flavor, validate_serving_input=False)


def load(path: str | Path) -> Learner:
    """The learner in a local MLflow model folder. UserError, before anything is made, for a folder that is not safe.

    A child process tries the model first: UserError too for a model with which this process would crash or hang, and for one
    that no longer answers as it did when it was logged. Runs no code from the folder. scikit-learn models that others logged
    as skops load too.
    """
    from alacarte.formats.load import check_example
    from alacarte.formats.probe import load_safely

    cls = _learner_class(Path(path))  # imports the framework before the child process is made, which then has it too
    _, model, pyfunc = load_safely(path)
    if hasattr(cls, "outputs") != hasattr(model, "outputs"):  # a network, or an estimator
        raise UserError(f"{path}: the model is no model of {cls.__name__}, which it names; log it again")
    learner = cls.of(model)
    example, metadata = pyfunc.input_example, pyfunc.metadata.metadata or {}
    if isinstance(example, pd.DataFrame) and "example_predictions" in metadata:
        try:
            check_example(learner.predict(example).tolist(), metadata)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return learner


def _learner_class(folder: Path) -> Any:
    """The learner that a model names, otherwise that of scikit-learn. `load_safely` refuses what cannot be read here."""
    from alacarte.formats.load import read_description

    try:
        module = (read_description(folder).metadata or {}).get("learner", DEFAULT_LEARNER)
    except Exception:
        module = DEFAULT_LEARNER
    return registered_learner(module)


def onward_rate(epoch: int, epochs: int) -> float:
    """By how much the learning rate is multiplied in epoch 0, 1, ... of a retraining: ONWARD at first, falling to zero.

    In so few epochs a model has to leave its minimum for what is new, and to settle again. The mean over the epoch of a
    line from ONWARD to 0 (warm restarts after Loshchilov and Hutter, SGDR, 2017, with a line for the cosine).
    """
    return ONWARD * (1 - (epoch + 0.5) / epochs)
