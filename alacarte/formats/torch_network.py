"""Torch models, made from net.json and safetensors with the classes of this checkout.

net.json names one class of `project` or of this library, and its arguments. The program in the same folder (pt2) is there
for stock MLflow. Opening such a program evaluates Python that it contains, so nothing here opens it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from alacarte.errors import UserError
from alacarte.formats.frameworks import PACKAGES, resolve
from alacarte.formats.network import NetworkModel

ROWS = 4096  # that a network gets at once, so that the outputs of its layers fit into the memory of a device


class TorchNetwork(NetworkModel):
    """`network` is a module of torch. A loaded one is on the CPU in eval mode."""

    network: nn.Module

    def outputs(self, numbers: np.ndarray) -> np.ndarray:
        device = next(self.network.parameters()).device
        self.network.eval()
        with torch.inference_mode():
            batches = [self.network(rows.to(device)).cpu() for rows in torch.from_numpy(numbers).split(ROWS)]
        return torch.cat(batches).numpy()

    def read(self, folder: Path) -> None:
        self.network = _rebuild(self.net, folder / "weights.safetensors").eval()


def network_class(target: str) -> type[nn.Module]:
    """The nn.Module class that "package.module.Class" names. UserError for all that is not such a class."""
    cls = resolve(target)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise UserError(
            f"model.network._target_={target}: allowed are nn.Module classes that a module of this checkout defines,"
            f" under {', '.join(PACKAGES)}"
        )
    return cls


def shapes(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, without memory for it. Raises whatever the class raises."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in make().state_dict().items()}


def _rebuild(net: dict[str, Any], weights: Path) -> nn.Module:
    from safetensors import safe_open
    from safetensors.torch import load_file

    arguments = {key: value for key, value in net["network"].items() if key != "_target_"}
    cls = network_class(str(net["network"].get("_target_")))
    make = partial(cls, n_inputs=net["n_inputs"], n_outputs=net["n_outputs"], **arguments)
    try:
        with safe_open(weights, "pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # no mapping
        # compared before memory is asked for: the file could describe a network of any size
        if (wanted := shapes(make)) != saved:
            different = sorted(key for key in wanted.keys() | saved.keys() if wanted.get(key) != saved.get(key))
            raise TypeError(f"{different[0]} is {saved.get(different[0])} and should be {wanted.get(different[0])}")
        network = make()
        network.load_state_dict(load_file(weights))
    except Exception as error:  # the class is the team's own, and gets arguments from the file
        reason, target = " ".join(str(error).split())[:200], net["network"]["_target_"]
        advice = "give a changed network another name"
        raise UserError(f"{weights}: the weights do not fit {target} as it is now: {reason}; {advice}") from error
    return network
