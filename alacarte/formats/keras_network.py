"""Keras models on the torch backend, made from a .keras file whose parts are on a list.

A .keras file is a zip of config.json and the weights (HDF5). config.json names the class of each layer. Keras in safe mode
refuses a Lambda layer, but it creates any registered class. So the names are checked here before Keras reads the file.
"""

import json
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch

from alacarte.errors import UserError
from alacarte.formats.check import objects_in
from alacarte.formats.classes import KERAS
from alacarte.formats.frameworks import import_extra
from alacarte.formats.network import NetworkModel

keras = import_extra("keras")

ROWS = 4096  # that a network gets at once
FILES = {"config.json", "metadata.json", "model.weights.h5"}
MAX_CONFIG = 2**24  # bytes of config.json


class KerasNetwork(NetworkModel):
    """`network` is a model of Keras."""

    network: Any

    def outputs(self, numbers: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            batches = [
                keras.ops.convert_to_numpy(self.network(rows, training=False))
                for rows in torch.from_numpy(numbers).split(ROWS)
            ]
        return np.concatenate(batches)

    def read(self, folder: Path) -> None:
        file = folder / "model.keras"
        check_config(file)
        self.network = keras.saving.load_model(file, compile=False, safe_mode=True)
        shapes = (self.network.input_shape, self.network.output_shape)
        wanted = ((None, self.net["n_inputs"]), (None, self.net["n_outputs"]))
        if shapes != wanted:
            raise UserError(
                f"{file}: its shapes are {shapes}, and net.json says {wanted}; train and log the model again"
            )


def check_config(file: Path) -> None:
    """UserError for a file that names anything but the classes of KERAS, or that contains other files."""
    try:
        with ZipFile(file) as archive:
            packed = {entry.filename for entry in archive.infolist() if entry.compress_type != ZIP_STORED}
            if set(archive.namelist()) != FILES or packed:
                raise ValueError(
                    f"it contains {sorted(archive.namelist())}, allowed are {sorted(FILES)}, not compressed"
                )
            if (size := archive.getinfo("config.json").file_size) > MAX_CONFIG:
                raise ValueError(f"config.json has {size} bytes, allowed are {MAX_CONFIG}")
            objects = list(objects_in(json.loads(archive.read("config.json")), "class_name"))
        names = {(each.get("module"), each["class_name"], each.get("registered_name")) for each in objects}
    except Exception as error:  # a forged file can break the reader anywhere
        raise UserError(f"{file}: not a .keras file that can be read: {' '.join(str(error).split())[:200]}") from error
    for module, name, registered in sorted(names, key=str):
        is_tensor = (module, name, registered) == (None, "__keras_tensor__", None)
        if not is_tensor and ((module, name) not in KERAS or registered not in (None, name)):
            raise UserError(
                f"{file}: needs {module}.{name}, which is not in alacarte/formats/classes.py: not loaded or saved"
            )
