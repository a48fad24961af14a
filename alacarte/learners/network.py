"""Base of the learners whose models map a matrix of numbers to one output per class: torch, Keras and your own frameworks."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd

from alacarte import formats
from alacarte.errors import UserError
from alacarte.features import Features, labels, requirements, signature, to_numbers, transform, widen
from alacarte.folders import PACKAGE
from alacarte.formats import network_pyfunc
from alacarte.formats.frameworks import registered_learner
from alacarte.formats.network import NetworkModel, check_settings
from alacarte.learners import Learner, OnEpoch, Rows, TrainingData

if TYPE_CHECKING:
    from mlflow.models import Model


class NetworkLearner(NetworkModel, Learner):
    """A subclass implements start, train, outputs, write and read. `self.net` has n_inputs, n_outputs, task and classes.

    The settings are the keys of the file in conf/model/. They must be numbers, texts, lists or null.
    """

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

    def set_seed(self, seed: int) -> None:
        """Called before `start` and before each training."""

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
        return self.net["epochs"]

    def transformer(self) -> Any:
        return self.preprocess

    def fit_from_scratch(self, data: TrainingData, task: str, features: Features) -> None:
        """on_epoch gets train_loss (the mean over the epoch), val_loss, and val_accuracy or val_r2."""
        y = data.y
        self.preprocess, inputs = features.fit_transform(data.X, y, data.seed)
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
        self.set_seed(data.seed)
        self.start()
        rows = Rows(to_numbers(inputs), self._targets(y), data.weight)
        validation = self._rows(data.X_val, data.y_val, data.val_weight)
        self.net["epochs"] = self.train(rows, validation, self.settings.get("max_epochs", 1), False, data.on_epoch)

    def fit_further(self, data: TrainingData, epochs: int) -> int:
        """Train for all epochs, and keep the last weights.

        There is no early stopping: most validation rows are old ones, and would choose the weights that changed least.
        """
        self.set_seed(data.seed)
        widen(self.preprocess, data.X)
        rows = self._rows(data.X, data.y, data.weight)
        validation = self._rows(data.X_val, data.y_val, data.val_weight)
        return self.train(rows, validation, epochs, True, data.on_epoch)

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
                pip_requirements=requirements(*self.packages),
                metadata=metadata | self.describe_answers(example),
            )
        formats.copy_project(path, [*types, type(self).__module__])

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The learner of a model of your own framework, from the files of `write`."""
        learner = super().load(folder)
        learner.settings = learner.net["settings"]
        return learner

    @classmethod
    def of(cls, model: Any) -> Self:
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


class MadeNetworkLearner(NetworkLearner):
    """Base of torch and Keras. It trains `network(n_inputs=..., n_outputs=...)`, a functools.partial with other arguments.

    Settings: lr and weight_decay of AdamW; batch_size in rows; max_epochs; patience: training ends after so many epochs
    without a better validation loss, and the best epoch's weights are kept.
    """

    loader_module = "network_pyfunc"
    code_paths: ClassVar = (network_pyfunc.__file__,)
    network: Any

    def __init__(self, network: Callable[..., Any], **settings: Any) -> None:
        super().__init__(**settings)
        self.make_network = network if isinstance(network, partial) else partial(network)

    @staticmethod
    @abstractmethod
    def find_network(target: str) -> Callable[..., Any]:
        """The class or function that "package.module.name" names. UserError if it makes no network of this framework."""

    @classmethod
    def of(cls, model: Any) -> Self:
        arguments = dict(model.net["network"])
        learner = cls(
            partial(cls.find_network(str(arguments.pop("_target_", None))), **arguments), **model.net["settings"]
        )
        learner.net, learner.preprocess, learner.network = model.net, model.preprocess, model.network
        return learner

    def make(self) -> Any:
        return self.make_network(n_inputs=self.net["n_inputs"], n_outputs=self.net["n_outputs"])

    def describe(self) -> dict[str, Any]:
        """The name and the arguments of the network, as Hydra writes them."""
        check_settings(self.settings)
        network = self.make_network
        if network.args:
            raise UserError("model.network: arguments without a name cannot be saved; name them")
        target = f"{network.func.__module__}.{network.func.__qualname__}"
        self.find_network(target)
        try:
            return json.loads(json.dumps({"_target_": target, **network.keywords}))
        except TypeError as error:
            raise UserError(f"model.network: {error}; allowed are numbers, text, lists and null") from error


def _load_pyfunc(path: str) -> NetworkLearner:
    """Called by mlflow.pyfunc.load_model with the path of data/network. It uses the library in the model."""
    from mlflow.models import Model

    metadata = Model.load(str(Path(path).parents[1])).metadata or {}
    return registered_learner(metadata["learner"]).load(Path(path))
