"""Models that make one output per class from a matrix of numbers: those of torch, of Keras and of your own frameworks.

net.json describes such a model, preprocess.skops makes the matrix from the columns, and the framework has files of its own.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
import pandas as pd
from scipy.special import softmax

from alacarte.errors import UserError
from alacarte.features import to_numbers
from alacarte.formats.check import load_skops
from alacarte.formats.network_pyfunc import predictions

MAX_ARGUMENTS = 10_000  # characters of the JSON that holds a network's arguments

# The type of each setting of torch and Keras, and its minimum.
SETTINGS: dict[str, tuple[Any, int]] = {
    "lr": (int | float, 0),
    "weight_decay": (int | float, 0),
    "batch_size": (int, 1),
    "max_epochs": (int, 1),
    "patience": (int, 1),
}

Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]


class _Target(msgspec.Struct):
    mean: float
    scale: float


class _Net(msgspec.Struct):
    """The types in net.json."""

    network: dict[str, Any]
    settings: dict[str, Any]
    n_inputs: Size
    n_outputs: Size
    task: Literal["classification", "regression"]
    classes: list[str | int | float | bool] | None
    target: _Target | None
    epochs: Size


class NetworkModel(ABC):
    """A model with the contents `net` of net.json and the fitted transformer `preprocess`; a subclass has `outputs`."""

    net: dict[str, Any]
    preprocess: Any

    @abstractmethod
    def outputs(self, numbers: np.ndarray) -> np.ndarray:
        """(n, n_outputs) from float32 (n, n_inputs): a logit per class, or one number in standard deviations."""

    def predict(self, data: pd.DataFrame, params: dict | None = None) -> np.ndarray:
        """(n,) labels, or float64 for regression."""
        return predictions(self.outputs(self.numbers(data)), self.net)

    def predict_proba(self, data: pd.DataFrame) -> np.ndarray | None:
        """(n, n_classes) float64. None for regression."""
        if self.net["classes"] is None:
            return None
        return softmax(self.outputs(self.numbers(data)).astype("float64"), axis=1)

    def numbers(self, data: pd.DataFrame) -> np.ndarray:
        """The matrix (n, n_inputs) for a table with the original columns."""
        return to_numbers(data if self.preprocess is None else self.preprocess.transform(data))

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Read the network. The files can come from somebody else. UserError where they do not fit `net`."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The model in a folder. UserError for files that do not describe one."""
        model = cls()
        model.net = read_net(folder / "net.json")
        if model.net["network"]:  # of torch or Keras
            check_settings(model.net["settings"])
        model.preprocess = load_skops(folder / "preprocess.skops")
        model.read(folder)
        return model


def read_net(file: Path) -> dict[str, Any]:
    """The contents of net.json. UserError where a value has another type, or where two values contradict each other."""
    net = json.loads(file.read_text())
    try:
        checked = msgspec.convert(net, _Net)
    except msgspec.ValidationError as error:
        raise UserError(f"{file}: {error}; train and log the model again") from error
    regression = checked.task == "regression"
    fits = (checked.classes is None) == regression and (checked.target is None) != regression
    if not fits or checked.n_outputs != len(checked.classes or [0]):
        raise UserError(
            f"{file}: task, classes, target and n_outputs contradict each other; train and log the model again"
        )
    if len(json.dumps([checked.network, checked.settings])) > MAX_ARGUMENTS:
        raise UserError(f"{file}: network and settings have more than {MAX_ARGUMENTS} characters of arguments")
    return net


def check_settings(settings: dict[str, Any]) -> None:
    if unknown := settings.keys() ^ SETTINGS.keys():
        raise UserError(f"model.{min(unknown)}: the settings are {', '.join(SETTINGS)}, each of them once")
    for name, (kind, minimum) in SETTINGS.items():
        if not isinstance(settings[name], kind) or not settings[name] >= minimum:
            whole = "whole numbers" if kind is int else "numbers"
            raise UserError(f"model.{name}={settings[name]}: allowed are {whole} from {minimum} on")
