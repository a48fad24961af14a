"""Base of the learners whose models map a matrix of numbers to one output per class: torch, Keras and your own frameworks."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from alacarte import formats
from alacarte.errors import UserError
from alacarte.features import (
    TABULAR,
    Features,
    is_tabular,
    labels,
    requirements,
    signature,
    threads_for,
    to_numbers,
    transform,
    unfitted,
    widen,
)
from alacarte.folders import PACKAGE
from alacarte.formats.frameworks import registered_learner
from alacarte.formats.network import NetworkModel
from alacarte.learners import OnEpoch, Rows, Update, check_changed, log_model, outputs, with_answers

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo


class NetworkLearner(NetworkModel):
    """A subclass implements start, train, outputs, write and read. `self.net` has n_inputs, n_outputs, task and classes.

    The settings are the keys of the file in conf/model/. They must be numbers, texts, lists or null.
    """

    packages: ClassVar[tuple[str, ...]] = ()  # what a model needs, pinned in its requirements
    loader_module = "alacarte.learners.network"  # of MLflow's python_function; then the model contains this library
    code_paths: ClassVar[tuple[str, ...]] = (str(PACKAGE),)

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.net: dict[str, Any] = {}
        self.preprocess: Any = None

    # --- what a framework implements; NetworkModel.outputs too ---

    @abstractmethod
    def start(self) -> None:
        """Make an untrained network."""

    @abstractmethod
    def train(self, rows: Rows, validation: Rows, epochs: int, further: bool, on_epoch: OnEpoch | None) -> int:
        """Train for at most `epochs` epochs. Return the number of epochs. `further`: continue from the present weights.

        The inputs are float32. The targets are the numbers of the classes, or the scaled target.
        """

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the network to files, without pickle."""

    def read(self, folder: Path) -> None:
        """Read what `write` wrote. The files can come from somebody else. Torch and Keras have loaders in formats/."""
        raise AssertionError(f"{type(self).__name__} needs a method read(folder)")

    def set_seed(self, seed: int) -> None:
        """Called before `start` and before each training."""

    def shrink_perturb(self, shrink: float) -> str | None:
        """Mix the weights with fresh ones. Otherwise return a note."""
        return f"shrink_perturb is for networks: {type(self).__name__} starts warm"

    def describe(self) -> dict[str, Any]:
        """What net.json holds under "network"."""
        return {}

    def mlflow_flavor(self) -> dict[str, Any]:
        """What MLmodel holds for the framework."""
        return {"data": "data/network"}

    # --- the same for all ---

    @property
    def task(self) -> str:
        return self.net["task"]

    @property
    def classes(self) -> list | None:
        return self.net["classes"]

    @property
    def epochs(self) -> int:
        return self.net.get("epochs") or self.settings.get("max_epochs", 1)

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
        on_epoch: OnEpoch | None = None,
    ) -> None:
        """on_epoch gets train_loss (the mean over the epoch), val_loss, and val_accuracy or val_r2."""
        self.preprocess, inputs = features.fit_transform(X, y, seed)
        classes = np.unique(labels(y)).tolist() if task == "classification" else None
        self.net = {
            "network": self.describe(),
            "settings": self.settings,
            "n_inputs": inputs.shape[1],
            "n_outputs": len(classes or [0]),
            "task": task,
            "classes": classes,
            "target": {"mean": float(y.mean()), "scale": float(y.std(ddof=0)) or 1.0} if classes is None else None,
        }
        self.set_seed(seed)
        self.start()
        rows = Rows(to_numbers(inputs), self._targets(y), weight)
        with threads_for(X):
            epochs = self.settings.get("max_epochs", 1)
            self.net["epochs"] = self.train(rows, self._rows(X_val, y_val), epochs, False, on_epoch)

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
        """Train for all `share` of the epochs, and keep the last weights.

        There is no early stopping: most validation rows are old ones, and would choose the weights that changed least.
        """
        if init == "scratch":
            features = unfitted(self.preprocess)
            self.fit(
                *(X, y, X_val, y_val),
                task=self.task,
                seed=seed,
                features=features,
                weight=weight,
                on_epoch=on_epoch,
            )
            return Update(init, self.epochs, self.epochs * len(X))
        assert self.classes is None or set(y.tolist()) <= set(self.classes), "labels of unknown classes are kept out"
        self.set_seed(seed)
        before = outputs(self, X)
        note = self.shrink_perturb(shrink) if init == "shrink_perturb" else None
        if is_tabular(self.preprocess):
            widen(self.preprocess, X)
        with threads_for(X):
            epochs = max(1, int(share * self.epochs))
            epochs = self.train(self._rows(X, y, weight), self._rows(X_val, y_val), epochs, True, on_epoch)
        check_changed(before, self, X)
        return Update("warm" if note else init, epochs, epochs * len(X), note)

    def numbers(self, data: pd.DataFrame) -> np.ndarray:
        return to_numbers(transform(self.preprocess, data))

    def save(
        self, path: Path, *, example: pd.DataFrame, metadata: dict[str, Any], mlflow_model: Model | None = None
    ) -> None:
        """Two flavors over the folder data/network: that of the framework, and python_function for the original columns."""
        import mlflow.pyfunc
        from mlflow.models import Model

        model = mlflow_model or Model()
        with TemporaryDirectory() as temporary:
            data = Path(temporary) / "network"
            data.mkdir()
            (data / "net.json").write_text(json.dumps(self.net, indent=2))
            types = formats.save_skops(self.preprocess, data / "preprocess.skops")
            self.write(data)
            model.add_flavor(type(self).flavor, **self.mlflow_flavor())  # type: ignore[attr-defined]
            mlflow.pyfunc.save_model(
                str(path),
                mlflow_model=model,
                loader_module=self.loader_module,
                code_paths=list(self.code_paths),
                data_path=str(data),
                signature=signature(self.preprocess, example, self.classes),
                input_example=example,
                pip_requirements=requirements("scipy", *self.packages),
                metadata=with_answers(self, example, metadata),
            )
        formats.copy_project(path, [*types, type(self).__module__])

    def log(self, name: str, *, example: pd.DataFrame, metadata: dict[str, Any]) -> ModelInfo:
        return log_model(self, name, example=example, metadata=metadata)

    @classmethod
    def load(cls, folder: Path) -> NetworkLearner:
        """The learner of a model of your own framework, from the files of `write`."""
        learner = cls()
        learner.read_description(folder)
        learner.settings = learner.net["settings"]
        learner.read(folder)
        return learner

    @classmethod
    def of(cls, model: Any) -> NetworkLearner:
        """The learner of a loaded model, with which it can be trained further."""
        if type(model) is not cls:
            raise UserError(f"the model is no model of {cls.__name__}")
        return model

    def _rows(self, X: pd.DataFrame, y: pd.Series, weight: np.ndarray | None = None) -> Rows:
        return Rows(self.numbers(X), self._targets(y), weight)

    def _targets(self, y: pd.Series) -> np.ndarray:
        if self.classes is None:
            target = self.net["target"]
            return ((y.to_numpy(dtype="float64") - target["mean"]) / target["scale"]).astype("float32")
        number = {label: i for i, label in enumerate(self.classes)}
        return np.array([number[label] for label in y.tolist()], dtype="int64")


def describe_network(network: Callable[..., Any], check: Callable[[str], object]) -> dict[str, Any]:
    """The name and the arguments of a functools.partial, as net.json holds them and Hydra writes them."""
    network = network if isinstance(network, partial) else partial(network)
    if network.args:
        raise UserError("model.network: arguments without a name cannot be saved; name them")
    target = f"{network.func.__module__}.{network.func.__qualname__}"
    check(target)
    try:
        return json.loads(json.dumps({"_target_": target, **network.keywords}))
    except TypeError as error:
        raise UserError(f"model.network: {error}; allowed are numbers, text, lists and null") from error


def _load_pyfunc(path: str) -> NetworkLearner:
    """Called by mlflow.pyfunc.load_model with the path of data/network. It uses the library in the model."""
    from mlflow.models import Model

    metadata = Model.load(str(Path(path).parents[1])).metadata or {}
    return registered_learner(metadata["learner"]).load(Path(path))
