"""A torch network as a learner: trained with early stopping, saved as pt2, safetensors and the JSON that rebuilds it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

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
from alacarte.formats import torch_network, torch_pyfunc
from alacarte.learners import OnEpoch, Update, check_changed, log_model, onward_rate, outputs, register, with_answers

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

# What each setting must be, and its least value.
KNOBS: dict[str, tuple[Any, int]] = {
    "lr": (int | float, 0),
    "weight_decay": (int | float, 0),
    "batch_size": (int, 1),
    "max_epochs": (int, 1),
    "patience": (int, 1),
}


@register("pytorch")
class TorchLearner:
    """Trains `network(n_inputs=..., n_outputs=...)`, a functools.partial of an nn.Module class with its other arguments.

    lr, weight_decay: AdamW's. batch_size in rows. max_epochs and patience in epochs: training ends when the validation
    loss has not improved for `patience` of them, and the best epoch's weights are kept. device: "auto" (cuda, else
    mps, else cpu) or one of torch's names.
    """

    def __init__(
        self,
        network: Callable[..., nn.Module],
        *,
        lr: float,
        weight_decay: float,
        batch_size: int,
        max_epochs: int,
        patience: int,
        device: str = "auto",
    ) -> None:
        self.make_network = network
        self.knobs: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "batch_size": batch_size}
        self.knobs |= {"max_epochs": max_epochs, "patience": patience}
        self.device: Any = device  # a torch.device from fit or load on
        self.task = ""
        self.classes: list | None = None
        self.preprocess: Any = None
        self.network: Any = None
        self.net: dict[str, Any] = {}  # net.json

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
        _check(self.knobs)
        self.device = _device(str(self.device))
        torch.manual_seed(seed)
        self.task = task
        self.preprocess, train_inputs = features.fit_transform(X, y, seed)
        inputs, inputs_val = self._to_tensor(train_inputs), self._inputs(X_val)
        self.classes = np.unique(labels(y)).tolist() if task == "classification" else None
        scale = {"mean": float(y.mean()), "scale": float(y.std(ddof=0)) or 1.0} if self.classes is None else None
        self.net = {
            "network": _describe(self.make_network),
            "n_inputs": inputs.shape[1],
            "n_outputs": len(self.classes or [0]),
            "task": task,
            "classes": self.classes,
            "target": scale,
            "learner": self.knobs,
            "versions": {name: version(name) for name in ("torch", "scikit-learn", "skops", "safetensors")},
        }
        try:
            torch_network.shapes(self.make_network, self.net["n_inputs"], self.net["n_outputs"])  # as loading does
            network = self.make_network(n_inputs=self.net["n_inputs"], n_outputs=self.net["n_outputs"])
        except (TypeError, RuntimeError) as error:
            raise UserError(f"model.network: {self.net['network']['_target_']}: {error}") from error
        self.network = network.to(self.device)
        with threads_for(X):
            self.net["epochs"] = self._train(
                inputs, self._targets(y), inputs_val, self._targets(y_val), self.knobs["max_epochs"], on_epoch
            )

    @property
    def epochs(self) -> int:
        return self.net.get("epochs") or self.knobs["max_epochs"]

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
        on_epoch: OnEpoch | None = None,
    ) -> Update:
        """All `share` of the epochs at `onward_rate`, and the weights they end in.

        No best epoch is looked for: most validation rows are old ones, and these would choose whatever changed least.
        """
        if init == "scratch":
            anew = TorchLearner(self.make_network, **self.knobs, device=str(self.device))
            features = unfitted(self.preprocess)
            anew.fit(X, y, X_val, y_val, task=self.task, seed=seed, features=features, on_epoch=on_epoch)
            vars(self).update(vars(anew))
            return Update(init, self.epochs, self.epochs * len(X))
        assert self.classes is None or set(y.tolist()) <= set(self.classes), "labels of unknown classes are kept out"
        torch.manual_seed(seed)
        before = outputs(self, X)
        if init == "shrink_perturb":
            fresh = self.make_network(n_inputs=self.net["n_inputs"], n_outputs=self.net["n_outputs"]).to(self.device)
            with torch.no_grad():
                for kept, new in zip(self.network.parameters(), fresh.parameters(), strict=True):
                    kept.mul_(shrink).add_(new, alpha=1 - shrink)
        if is_tabular(self.preprocess):
            widen(self.preprocess, X)
        most = max(1, int(share * self.epochs))
        with threads_for(X):
            parts = self._inputs(X), self._targets(y), self._inputs(X_val), self._targets(y_val)
            epochs = self._train(*parts, most, on_epoch, onward=True)
        check_changed(before, self, X)
        return Update(init, epochs, epochs * len(X))

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        return torch_pyfunc.predictions(self._outputs(self._inputs(X)).cpu().numpy(), self.net)

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray | None:
        if self.classes is None:
            return None
        return self._outputs(self._inputs(X)).cpu().double().softmax(dim=1).numpy()

    def save(
        self, path: Path, *, example: pd.DataFrame, metadata: dict[str, Any], mlflow_model: Model | None = None
    ) -> None:
        """Two flavors over the folder data/network: pytorch takes preprocessed float32, python_function the columns."""
        import mlflow.pyfunc
        from mlflow.models import Model
        from safetensors.torch import save_file

        model = mlflow_model or Model()
        network = copy.deepcopy(self.network).cpu().eval()
        with TemporaryDirectory() as temporary:
            data = Path(temporary) / "network"
            data.mkdir()
            _export(network, self.net["n_inputs"], data / "model.pt2")
            save_file(network.state_dict(), data / "weights.safetensors")
            (data / "net.json").write_text(json.dumps(self.net, indent=2))
            types = formats.save_skops(self.preprocess, data / "preprocess.skops")
            model.add_flavor("pytorch", model_data="data/network", pytorch_version=str(torch.__version__), code=None)
            mlflow.pyfunc.save_model(
                str(path),
                mlflow_model=model,
                loader_module="torch_pyfunc",
                code_paths=[torch_pyfunc.__file__],
                data_path=str(data),
                signature=signature(self.preprocess, example, self.classes),
                input_example=example,
                pip_requirements=requirements("scipy", "torch"),
                metadata=with_answers(self, example, metadata),
            )
        formats.copy_project(path, types)

    def log(self, name: str, *, example: pd.DataFrame, metadata: dict[str, Any]) -> ModelInfo:
        return log_model(self, name, example=example, metadata=metadata)

    @classmethod
    def of(cls, model: torch_network.TorchNetwork) -> TorchLearner:
        """The learner of a loaded model, so that it can be trained on: on the best device here, wherever it was trained."""
        net = model.net
        learner = cls(torch_network.maker(net["network"]), **net["learner"])
        learner.device = _device("auto")
        learner.net, learner.task, learner.classes = net, net["task"], net["classes"]
        learner.preprocess, learner.network = model.preprocess, model.network.to(learner.device)
        return learner

    def _train(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        inputs_val: torch.Tensor,
        targets_val: torch.Tensor,
        max_epochs: int,
        on_epoch: OnEpoch | None,
        onward: bool = False,
    ) -> int:
        """Stop early and keep the weights of the best epoch, or `onward` those of the last; how many were trained."""
        knobs, network = self.knobs, self.network
        optimizer = torch.optim.AdamW(network.parameters(), lr=knobs["lr"], weight_decay=knobs["weight_decay"])
        best_loss, best_epoch, best_weights = math.inf, 0, network.state_dict()
        epochs, epoch = range(max_epochs), 0
        with tqdm(epochs, desc=f"training on {self.device}", unit="epoch", mininterval=0.5) as bar:
            for epoch in bar:
                if onward:
                    optimizer.param_groups[0]["lr"] = knobs["lr"] * onward_rate(epoch, max_epochs)
                metrics = {
                    "train_loss": self._epoch(optimizer, inputs, targets),
                    **self._score(inputs_val, targets_val),
                }
                bar.set_postfix({name: f"{value:.4f}" for name, value in metrics.items()}, refresh=False)
                if on_epoch:
                    on_epoch(epoch, metrics)
                if not math.isfinite(metrics["train_loss"]):
                    raise UserError(f"model.lr={knobs['lr']}: the loss is not finite in epoch {epoch}; lower it")
                if onward:
                    continue
                if metrics["val_loss"] < best_loss:
                    best_loss, best_epoch = metrics["val_loss"], epoch
                    best_weights = copy.deepcopy(network.state_dict())
                elif epoch - best_epoch >= knobs["patience"]:
                    break
        if not onward:
            network.load_state_dict(best_weights)
        return epoch + 1

    def _epoch(self, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """One pass over the rows in random order; the mean loss on the way."""
        self.network.train()
        total = torch.zeros((), device=self.device)
        for rows in torch.randperm(len(inputs), device=self.device).split(self.knobs["batch_size"]):
            if len(rows) == 1 < len(inputs):
                continue  # a last batch of one row would break batch normalisation
            loss = self._loss(self.network(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        return total.item() / len(inputs)

    def _score(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        outputs = self._outputs(inputs)
        loss = self._loss(outputs, targets).item()
        if self.classes is not None:
            return {"val_loss": loss, "val_accuracy": (outputs.argmax(dim=1) == targets).float().mean().item()}
        spread = targets.var(correction=0).item() or 1.0
        return {"val_loss": loss, "val_r2": 1 - loss / spread}

    def _loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs[:, 0], targets) if self.classes is None else F.cross_entropy(outputs, targets)

    def _inputs(self, X: pd.DataFrame) -> torch.Tensor:
        return self._to_tensor(transform(self.preprocess, X))

    def _to_tensor(self, inputs: Any) -> torch.Tensor:
        return torch.from_numpy(to_numbers(inputs)).to(self.device)

    def _targets(self, y: pd.Series) -> torch.Tensor:
        if self.classes is None:
            scaled = (y.to_numpy(dtype="float64") - self.net["target"]["mean"]) / self.net["target"]["scale"]
            return torch.from_numpy(scaled.astype("float32")).to(self.device)
        index = {label: i for i, label in enumerate(self.classes)}
        return torch.tensor([index[label] for label in y.tolist()], device=self.device)

    def _outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        self.network.eval()
        with torch.inference_mode():
            return self.network(inputs)


def _check(knobs: dict[str, Any]) -> None:
    for name, (kind, least) in KNOBS.items():
        if not isinstance(knobs[name], kind) or not knobs[name] >= least:
            whole = "whole numbers" if kind is int else "numbers"
            raise UserError(f"model.{name}={knobs[name]}: allowed are {whole} from {least} on")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device={name}: {reason}; allowed are auto, cpu, and what torch finds here") from error


def _describe(network: Callable[..., nn.Module]) -> dict[str, Any]:
    """The class and the arguments of a functools.partial, as net.json holds them and Hydra writes them."""
    network = network if isinstance(network, partial) else partial(network)
    if network.args:
        raise UserError("model.network: arguments without a name cannot be saved; name them")
    target = f"{network.func.__module__}.{network.func.__qualname__}"
    torch_network.resolve(target)
    try:
        return json.loads(json.dumps({"_target_": target, **network.keywords}))
    except TypeError as error:
        raise UserError(f"model.network: {error}; allowed are numbers, text, lists and null") from error


def _export(network: nn.Module, n_inputs: int, file: Path) -> None:
    """Write the network as pt2, for any number of rows."""
    # A named dimension, and two rows: torch.export takes a size of 1 for a constant.
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.zeros(2, n_inputs),), dynamic_shapes=({0: batch},))
    torch.export.save(program, file)
