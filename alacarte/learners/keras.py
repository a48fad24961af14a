"""A Keras network as a learner: Keras 3 on the torch backend, trained with early stopping, saved as a .keras file."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alacarte.errors import UserError
from alacarte.formats.frameworks import PACKAGES, register, resolve
from alacarte.formats.keras_network import KerasNetwork, check_config, keras
from alacarte.learners import OnEpoch, Rows, onward_rate
from alacarte.learners.network import MadeNetworkLearner


@register("keras")
class KerasLearner(MadeNetworkLearner, KerasNetwork):
    """`network` is a function that returns a keras.Model."""

    packages = ("keras", "torch")

    @staticmethod
    def find_network(target: str) -> Callable[..., Any]:
        function = resolve(target)
        wanted = {"n_inputs", "n_outputs"}
        if not (inspect.isfunction(function) and wanted <= set(inspect.signature(function).parameters)):
            raise UserError(
                f"model.network._target_={target}: allowed are functions with the arguments n_inputs and n_outputs that a"
                f" module of this checkout defines, under {', '.join(PACKAGES)}"
            )
        return function

    def set_seed(self, seed: int) -> None:
        keras.utils.set_random_seed(seed)

    def start(self) -> None:
        name = f"model.network: {self.net['network']['_target_']}"
        try:
            network = self.make()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{name}: {' '.join(str(error).split())}") from error
        wanted = (None, self.net["n_outputs"])
        if not isinstance(network, keras.Model) or network.output_shape != wanted:
            raise UserError(f"{name} returns {network!r:.60}: return a keras.Model with output_shape {wanted}")
        self.network = network

    def shrink_perturb(self, shrink: float, seed: int) -> str | None:
        self.set_seed(seed)
        fresh = keras.models.clone_model(self.network)
        pairs = zip(self.network.trainable_variables, fresh.trainable_variables, strict=True)
        for kept, new in pairs:
            kept.assign(shrink * kept + (1 - shrink) * new)
        return None

    def train(self, rows: Rows, validation: Rows, epochs: int, further: bool, on_epoch: OnEpoch | None) -> int:
        """Stop early and keep the weights of the best epoch. `further`: keep the weights of the last epoch."""
        settings, classes = self.settings, self.classes
        self.network.compile(
            keras.optimizers.AdamW(settings["lr"], settings["weight_decay"]),
            loss="mse" if classes is None else keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.R2Score(name="r2") if classes is None else "accuracy"],
            weighted_metrics=[],
        )

        def report(epoch: int, logs: dict[str, float]) -> None:
            if not math.isfinite(logs["loss"]):
                raise UserError(f"model.lr={settings['lr']}: the loss is not finite in epoch {epoch}; lower it")
            if on_epoch:
                metrics = {name: float(value) for name, value in logs.items() if name.startswith("val_")}
                on_epoch(epoch, {"train_loss": float(logs["loss"]), **metrics})

        stop_early = keras.callbacks.EarlyStopping(patience=settings["patience"], restore_best_weights=True)
        lower_rate = keras.callbacks.LearningRateScheduler(lambda epoch: settings["lr"] * onward_rate(epoch, epochs))
        history = self.network.fit(
            rows.inputs,
            _column(rows.targets, classes),
            sample_weight=rows.weight,
            validation_data=(validation.inputs, _column(validation.targets, classes), validation.weight),
            batch_size=settings["batch_size"],
            epochs=epochs,
            callbacks=[lower_rate if further else stop_early, keras.callbacks.LambdaCallback(on_epoch_end=report)],
            verbose=0,
        )
        return len(history.epoch)

    def write(self, folder: Path) -> None:
        """Without loss and optimizer: each training begins with new ones, as for networks in torch."""
        network = type(self.network).from_config(self.network.get_config())
        network.set_weights(self.network.get_weights())
        network.save(folder / "model.keras")
        check_config(folder / "model.keras")

    def mlflow_flavor(self) -> dict[str, Any]:
        versions = {"keras_version": keras.__version__, "keras_backend": keras.backend.backend()}
        return {"data": "data/network", "save_exported_model": False, **versions}


def _column(targets: Any, classes: list | None) -> Any:
    return targets.reshape(-1, 1) if classes is None else targets
