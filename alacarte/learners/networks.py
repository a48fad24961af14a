"""Which networks there are: how one is named in JSON, rebuilt from it with its weights, and exported for whoever serves."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alacarte.errors import UserError

# Where a network may come from: a saved model names it, and naming it imports its module.
NETWORKS = ("project.", "alacarte.", "torch.nn.")


def describe(network: Callable[..., nn.Module]) -> dict[str, Any]:
    """The class and the arguments of a functools.partial, as net.json holds them and Hydra writes them."""
    network = network if isinstance(network, partial) else partial(network)
    if network.args:
        raise UserError("model.network: arguments without a name cannot be saved; name them")
    target = f"{network.func.__module__}.{network.func.__qualname__}"
    resolve(target)
    try:
        return json.loads(json.dumps({"_target_": target, **network.keywords}))
    except TypeError as error:
        raise UserError(f"model.network: {error}; allowed are numbers, text, lists and null") from error


def resolve(target: str) -> type[nn.Module]:
    try:
        found = pkgutil.resolve_name(target) if target.startswith(NETWORKS) else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"model.network._target_={target}: allowed are nn.Module classes under {', '.join(NETWORKS)}")
    return found


def maker(described: dict[str, Any]) -> Callable[..., nn.Module]:
    """What `describe` wrote down, as the functools.partial it was; UserError for anything but a network."""
    arguments = {key: value for key, value in described.items() if key != "_target_"}
    return partial(resolve(described["_target_"]), **arguments)


def rebuild(make: Callable[..., nn.Module], net: dict[str, Any], weights: Path) -> nn.Module:
    """The network of net.json with its weights; UserError if they do not fit what `make` makes now."""
    from safetensors.torch import load_file

    try:
        network = make(n_inputs=net["n_inputs"], n_outputs=net["n_outputs"])
        network.load_state_dict(load_file(weights))
    except (RuntimeError, TypeError) as error:
        reason, target = " ".join(str(error).split()), net["network"]["_target_"]
        mend = "give a changed network another name"
        raise UserError(f"{weights}: the weights do not fit {target} as it is now: {reason}; {mend}") from error
    return network


def export(network: nn.Module, n_inputs: int, file: Path) -> None:
    """Write the network as pt2, for any number of rows."""
    # A named dimension, and two rows: torch.export takes a size of 1 for a constant.
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.zeros(2, n_inputs),), dynamic_shapes=({0: batch},))
    torch.export.save(program, file)
