"""Keras on torch: forged files are refused before Keras reads them. test_learners.py and test_update.py train and load it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED

import h5py
import pytest
from forging import in_json, rewrite
from learning import fitted, table

from alacarte.errors import UserError
from alacarte.formats import probe


def dense(config: dict) -> dict:
    return next(part for part in config["config"]["layers"] if part["class_name"] == "Dense")


def layer(**values: Any) -> Callable[[dict], None]:
    """A change of the first dense layer."""
    return lambda config: dense(config).update(values)


def in_config(**values: Any) -> Callable[[dict], None]:
    return lambda config: dense(config)["config"].update(values)


CALL = {"class_name": "function", "config": "system", "module": "os", "registered_name": "system"}
LAMBDA = {"class_name": "__lambda__", "config": {"code": "4wAAAA==", "defaults": None, "closure": None}}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (layer(class_name="Lambda"), r"keras\.layers\.Lambda"),
        (layer(class_name="TorchModuleWrapper"), r"keras\.layers\.TorchModuleWrapper"),
        (layer(module="keras.src.utils.file_utils", class_name="get_file"), r"file_utils\.get_file"),
        (layer(module="project.networks", class_name="MLP"), r"project\.networks\.MLP"),
        (layer(module=None), r"None\.Dense"),
        (layer(registered_name="Package>Dense"), r"keras\.layers\.Dense"),
        (in_config(activation=CALL), r"os\.function"),
        (in_config(activation=LAMBDA), "__lambda__"),
        (in_config(kernel_initializer={**CALL, "module": "builtins", "config": "eval"}), r"builtins\.function"),
        (lambda config: config.update(compile_config={"loss": CALL}), r"os\.function"),
        (in_config(units=10**11), "needed more than|cannot be loaded"),
        (in_config(units=17), "cannot be loaded"),
    ],
)
def test_a_forged_config_is_refused(edit: Callable, reason: str, tmp_path: Path):
    X, _ = table("numeric", "classification")
    fitted("keras_mlp", "numeric", "classification").save(tmp_path / "model", example=X.head(5), metadata={})
    rewrite(tmp_path / "model/data/network/model.keras", in_json("config.json", edit))
    with pytest.raises(UserError, match=reason):
        probe.load_safely(tmp_path / "model")


def test_a_forged_file_is_refused(tmp_path: Path):
    X, _ = table("numeric", "classification")
    file = tmp_path / "model/data/network/model.keras"
    fitted("keras_mlp", "numeric", "classification").save(tmp_path / "model", example=X.head(5), metadata={})
    original = file.read_bytes()

    def unchanged(name: str, content: bytes) -> bytes:
        return content

    def refused(reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            probe.load_safely(tmp_path / "model")
        file.write_bytes(original)

    rewrite(file, unchanged)
    probe.load_safely(tmp_path / "model")
    rewrite(file, unchanged, ZIP_DEFLATED)
    refused("not compressed")
    rewrite(file, unchanged, **{"assets/layers/vocabulary.txt": b"a"})
    refused("it contains")
    file.write_bytes(b"\x80\x04")
    refused(r"not a \.keras file")
    with h5py.File(tmp_path / "weights.h5", "w") as weights:
        weights["layers"] = h5py.ExternalLink("/etc/passwd", "/")
    rewrite(file, unchanged, **{"model.weights.h5": (tmp_path / "weights.h5").read_bytes()})
    refused("cannot be loaded")
    net = tmp_path / "model/data/network/net.json"
    net.write_text(net.read_text().replace('"n_inputs": 4', '"n_inputs": 5'))
    refused("net.json says")
