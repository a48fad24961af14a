"""A torch network as a learner: trained with early stopping, saved as pt2, safetensors and the JSON that rebuilds it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from alacarte.errors import UserError
from alacarte.formats.frameworks import import_extra, register
from alacarte.learners import OnEpoch, Rows, onward_rate
from alacarte.learners.network import MadeNetworkLearner

import_extra("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from alacarte.formats import torch_network  # noqa: E402


@register("pytorch")
class TorchLearner(MadeNetworkLearner, torch_network.TorchNetwork):
    """`network` is an nn.Module class. device: "auto" (cuda, otherwise mps, otherwise cpu) or one of torch's names.

    A network can have two more methods: `loss(outputs, targets)` returns the loss of each row, (n,);
    `augment(inputs)` changes the rows of a batch, in training only.
    """

    packages = ("torch",)

    def __init__(self, network: Callable[..., nn.Module], *, device: str = "auto", **settings: Any) -> None:
        super().__init__(network, **settings)
        self.device: Any = device  # a torch.device after fit or load

    @classmethod
    def of(cls, model: torch_network.TorchNetwork) -> Self:
        """The learner of a loaded model, on the best device here."""
        learner = super().of(model)
        learner.device = _device("auto")
        learner.network.to(learner.device)
        return learner

    @staticmethod
    def find_network(target: str) -> type[nn.Module]:
        return torch_network.network_class(target)

    def set_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def start(self) -> None:
        self.device = _device(str(self.device))
        name, wanted = f"model.network: {self.net['network']['_target_']}", (2, self.net["n_outputs"])
        try:
            torch_network.shapes(self.make)  # as loading does
            self.network = self.make().to(self.device)
            shape = self.outputs(np.zeros((2, self.net["n_inputs"]), "float32")).shape
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{name}: {error}") from error
        if shape != wanted:
            raise UserError(f"{name} returns {shape} for 2 rows, wanted is {wanted}: use n_outputs")

    def shrink_perturb(self, shrink: float, seed: int) -> str | None:
        self.set_seed(seed)
        fresh = self.make().to(self.device)
        with torch.no_grad():
            for kept, new in zip(self.network.parameters(), fresh.parameters(), strict=True):
                kept.mul_(shrink).add_(new, alpha=1 - shrink)
        return None

    def train(self, rows: Rows, validation: Rows, epochs: int, further: bool, on_epoch: OnEpoch | None) -> int:
        """Stop early and keep the weights of the best epoch. `further`: keep the weights of the last epoch."""
        settings, network = self.settings, self.network
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
        best_loss, best_epoch, best_weights, epoch = math.inf, 0, network.state_dict(), 0
        with tqdm(range(epochs), desc=f"training on {self.device}", unit="epoch", mininterval=0.5) as bar:
            for epoch in bar:
                if further:
                    optimizer.param_groups[0]["lr"] = settings["lr"] * onward_rate(epoch, epochs)
                metrics = {"train_loss": self._epoch(optimizer, rows), **self._score(validation)}
                bar.set_postfix({name: f"{value:.4f}" for name, value in metrics.items()}, refresh=False)
                if on_epoch:
                    on_epoch(epoch, metrics)
                if not math.isfinite(metrics["train_loss"]):
                    raise UserError(f"model.lr={settings['lr']}: the loss is not finite in epoch {epoch}; lower it")
                if further:
                    continue
                if metrics["val_loss"] < best_loss:
                    best_loss, best_epoch = metrics["val_loss"], epoch
                    best_weights = copy.deepcopy(network.state_dict())
                elif epoch - best_epoch >= settings["patience"]:
                    break
        if not further:
            network.load_state_dict(best_weights)
        return epoch + 1

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        network = copy.deepcopy(self.network).cpu().eval()
        save_file(network.state_dict(), folder / "weights.safetensors")
        # Any number of rows: a named dimension, and two rows, because torch.export takes a size of 1 for a constant.
        example, rows = torch.zeros(2, self.net["n_inputs"]), torch.export.Dim("batch")
        program = torch.export.export(network, (example,), dynamic_shapes=({0: rows},))
        torch.export.save(program, folder / "model.pt2")

    def mlflow_flavor(self) -> dict[str, Any]:
        return {"model_data": "data/network", "pytorch_version": str(torch.__version__), "code": None}

    def _epoch(self, optimizer: torch.optim.Optimizer, rows: Rows) -> float:
        """Train on all rows in random order, one batch after the other. Return the mean loss on the way."""
        self.network.train()
        augment = getattr(self.network, "augment", None)
        weight = np.ones(len(rows.inputs), "float32") if rows.weight is None else rows.weight.astype("float32")
        table = [torch.from_numpy(values) for values in (rows.inputs, rows.targets, weight)]
        total = torch.zeros((), device=self.device)
        for batch in torch.randperm(len(weight)).split(self.settings["batch_size"]):
            if len(batch) == 1 < len(weight):
                continue  # a last batch of one row would break batch normalisation
            inputs, targets, weights = (values[batch].to(self.device) for values in table)
            losses = self._losses(self.network(augment(inputs) if augment else inputs), targets)
            optimizer.zero_grad()
            loss = (losses * weights).sum() / weights.sum().clamp(min=1e-12)
            loss.backward()
            optimizer.step()
            total += (losses.detach() * weights).sum()
        return total.item() / float(weight.sum())

    def _score(self, rows: Rows) -> dict[str, float]:
        outputs, targets = self.outputs(rows.inputs), rows.targets
        with torch.inference_mode():
            losses = self._losses(torch.from_numpy(outputs).to(self.device), torch.from_numpy(targets).to(self.device))

        def mean(values: np.ndarray) -> float:
            return float(np.average(values, weights=rows.weight))

        loss = mean(losses.cpu().numpy())
        if self.classes is not None:
            return {"val_loss": loss, "val_accuracy": mean(outputs.argmax(axis=1) == targets)}
        errors, variance = mean((outputs[:, 0] - targets) ** 2), mean((targets - mean(targets)) ** 2)
        return {"val_loss": loss, "val_r2": 1 - errors / (variance or 1.0)}

    def _losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(n,) losses: those of the network itself where it has a method `loss`."""
        if loss := getattr(self.network, "loss", None):
            losses = loss(outputs, targets)
            if tuple(losses.shape) != (len(targets),):
                name = f"{type(self.network).__module__}.{type(self.network).__qualname__}"
                raise UserError(
                    f"{name}.loss returns shape {tuple(losses.shape)}: return one loss per row, without a mean"
                )
            return losses
        if self.classes is None:
            return F.mse_loss(outputs[:, 0], targets, reduction="none")
        return F.cross_entropy(outputs, targets, reduction="none")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device={name}: {reason}; allowed are auto, cpu, and what torch finds here") from error
