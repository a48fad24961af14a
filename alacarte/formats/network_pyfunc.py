"""How MLflow's python_function flavor reads a network of torch or Keras. A copy of this file is in each such model.

It needs nothing else of this project. The folder of the model contains net.json, the preprocessing (skops) and the network:
an exported program of torch (pt2) or a .keras file. Change the contents of the folder only together with the name of this
file, because a process that serves two models imports a module of this name once.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def predictions(outputs: np.ndarray, net: dict) -> np.ndarray:
    """(n,) labels from logits (n, n_classes), or float64 in the target's unit from scaled numbers (n, 1)."""
    if net["classes"] is None:
        return outputs[:, 0].astype("float64") * net["target"]["scale"] + net["target"]["mean"]
    return np.asarray(net["classes"])[outputs.argmax(axis=1)]


class Predictor:
    def __init__(self, folder: Path) -> None:
        import skops.io

        self.net = json.loads((folder / "net.json").read_text())
        file = folder / "preprocess.skops"
        self.preprocess = skops.io.load(file, trusted=skops.io.get_untrusted_types(file=file))
        if (folder / "model.keras").exists():
            os.environ["KERAS_BACKEND"] = "torch"
            import keras

            self.network: Any = keras.saving.load_model(folder / "model.keras", compile=False)
        else:
            import mlflow.pytorch

            # MLflow's loader, because it heeds MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false where torch.export.load does not
            self.network = mlflow.pytorch.load_model(str(folder.parents[1]))

    def predict(self, data: pd.DataFrame, params: dict | None = None) -> np.ndarray:
        import torch

        inputs = data if self.preprocess is None else self.preprocess.transform(data)
        dense = inputs.toarray() if hasattr(inputs, "toarray") else inputs
        with torch.inference_mode():
            outputs = self.network(torch.from_numpy(np.asarray(dense, dtype="float32")))
            return predictions(outputs.cpu().numpy(), self.net)


def _load_pyfunc(path: str) -> Predictor:
    """Called by mlflow.pyfunc.load_model with the path of the model's folder data/network."""
    return Predictor(Path(path))
