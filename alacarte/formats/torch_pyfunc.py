"""How MLflow's python_function flavor reads a torch model. A copy of this file travels inside each such model.

It needs nothing else of this project: the folder beside it holds the preprocessing (skops), the network as an exported
program (pt2) and net.json. Change what a folder holds only together with the file's name: a process that
serves two models imports a module of this name once.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch


def predictions(outputs: np.ndarray, net: dict) -> np.ndarray:
    """(n,) labels from logits (n, n_classes), or float64 in the target's unit from scaled numbers (n, 1)."""
    if net["classes"] is None:
        return outputs[:, 0].astype("float64") * net["target"]["scale"] + net["target"]["mean"]
    return np.asarray(net["classes"])[outputs.argmax(axis=1)]


class Predictor:
    def __init__(self, folder: Path) -> None:
        import mlflow.pytorch
        import skops.io

        self.net = json.loads((folder / "net.json").read_text())
        file = folder / "preprocess.skops"  # trusted, as all code in this folder is
        self.preprocess = skops.io.load(file, trusted=skops.io.get_untrusted_types(file=file))
        # MLflow's loader, because it heeds MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false where torch.export.load does not
        self.network = mlflow.pytorch.load_model(str(folder.parents[1]))

    def predict(self, data: pd.DataFrame, params: dict | None = None) -> np.ndarray:
        numbers = torch.from_numpy(self.preprocess.transform(data).astype("float32"))
        with torch.inference_mode():
            return predictions(self.network(numbers).numpy(), self.net)


def _load_pyfunc(path: str) -> Predictor:
    """Called by mlflow.pyfunc.load_model with the path of the model's folder data/network."""
    return Predictor(Path(path))
