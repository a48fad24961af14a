"""Torch models of model=torch_mlp, made from net.json and safetensors with the classes of this checkout.

net.json names one class of `project` or of this library, and its arguments. The program in the same folder (pt2) is there
for stock MLflow. Opening such a program evaluates Python that it contains, so nothing here opens it.
"""

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pandas as pd
import torch
from torch import nn

from alacarte.errors import UserError
from alacarte.formats.check import load_skops
from alacarte.formats.torch_pyfunc import predictions

# Packages whose modules may be imported because a saved model names them.
PACKAGES = ("project.", "alacarte.")

MAX_ARGUMENTS = 10_000  # characters of the JSON that holds a network's arguments

Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]


class _Target(msgspec.Struct):
    mean: float
    scale: float


class _Settings(msgspec.Struct, forbid_unknown_fields=True):
    lr: float
    weight_decay: float
    batch_size: Size
    max_epochs: Size
    patience: Size


class _Net(msgspec.Struct):
    """The types in net.json."""

    network: dict[str, Any]
    n_inputs: Size
    n_outputs: Size
    task: Literal["classification", "regression"]
    classes: list[str | int | float | bool] | None
    target: _Target | None
    learner: _Settings
    epochs: Size | None = None


class TorchNetwork:
    """A model in a folder. `net` is net.json; `network` is on the CPU in eval mode, from (n, n_inputs) float32 to
    (n, n_outputs); `preprocess` makes its inputs from the original columns.

    Raises UserError where net.json, the weights and the class in this checkout do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.net = _read(folder / "net.json")
        self.network = _rebuild(self.net, folder / "weights.safetensors").eval()
        self.preprocess = load_skops(folder / "preprocess.skops")

    def predict(self, data: pd.DataFrame, params: dict | None = None) -> np.ndarray:
        """(n,) labels, or float64 for regression."""
        numbers = torch.from_numpy(self.preprocess.transform(data).astype("float32"))
        with torch.inference_mode():
            return predictions(self.network(numbers).numpy(), self.net)


def resolve(target: str) -> type[nn.Module]:
    """The nn.Module class that "package.module.Class" names; UserError for all that is not such a class defined there."""
    module, _, name = target.rpartition(".")
    cls = None
    if f"{module}.".startswith(PACKAGES) and "__" not in target:
        try:
            cls = vars(import_module(module)).get(name)
        except ModuleNotFoundError:
            cls = None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and f"{cls.__module__}.{cls.__qualname__}" == target):
        raise UserError(
            f"model.network._target_={target}: allowed are nn.Module classes that a module of this checkout defines,"
            f" under {', '.join(PACKAGES)}"
        )
    return cls


def maker(network: dict[str, Any]) -> Callable[..., nn.Module]:
    """The functools.partial that net.json describes under "network"; UserError for anything but a network."""
    return partial(resolve(network["_target_"]), **{key: value for key, value in network.items() if key != "_target_"})


def shapes(make: Callable[..., nn.Module], n_inputs: int, n_outputs: int) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, without memory for it. Raises whatever the class raises."""
    with torch.device("meta"):
        return {
            key: tuple(value.shape) for key, value in make(n_inputs=n_inputs, n_outputs=n_outputs).state_dict().items()
        }


def _read(file: Path) -> dict[str, Any]:
    net = json.loads(file.read_text())
    try:
        checked = msgspec.convert(net, _Net)
    except msgspec.ValidationError as error:
        raise UserError(f"{file}: {error}; train and log the model again") from error
    regression = checked.task == "regression"
    if (checked.classes is None, checked.target is None) != (regression, not regression):
        raise UserError(f"{file}: classes or target do not fit task={checked.task}; train and log the model again")
    if checked.n_outputs != len(checked.classes or [0]):
        raise UserError(f"{file}: n_outputs={checked.n_outputs} is not the number of classes; train the model again")
    if not isinstance(checked.network.get("_target_"), str) or len(json.dumps(checked.network)) > MAX_ARGUMENTS:
        raise UserError(f"{file}: network has no _target_, or more than {MAX_ARGUMENTS} characters of arguments")
    return net


def _rebuild(net: dict[str, Any], weights: Path) -> nn.Module:
    from safetensors import safe_open
    from safetensors.torch import load_file

    make, sizes = maker(net["network"]), {"n_inputs": net["n_inputs"], "n_outputs": net["n_outputs"]}
    try:
        with safe_open(weights, "pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # no mapping
        # compared before memory is asked for: the file could describe a network of any size
        if (wanted := shapes(make, **sizes)) != saved:
            different = sorted(key for key in wanted.keys() | saved.keys() if wanted.get(key) != saved.get(key))
            raise TypeError(f"{different[0]} is {saved.get(different[0])} and should be {wanted.get(different[0])}")
        network = make(**sizes)
        network.load_state_dict(load_file(weights))
    except Exception as error:  # the class is the team's own, and gets arguments from the file
        reason, target = " ".join(str(error).split())[:200], net["network"]["_target_"]
        mend = "give a changed network another name"
        raise UserError(f"{weights}: the weights do not fit {target} as it is now: {reason}; {mend}") from error
    return network
