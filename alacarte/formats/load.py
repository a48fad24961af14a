"""Load model folders for the server and the steps. A folder is checked before an object is made or code is run from it."""

import contextlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow.pyfunc
import numpy as np
import yaml
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel

from alacarte import formats
from alacarte.errors import UserError
from alacarte.formats.frameworks import import_extra, registered_learner

# What MLflow's sklearn flavor may be told to call, where it gives one answer a row.
PREDICT = ("predict", "predict_proba", "predict_log_proba", "predict_joint_log_proba")

# The loaders of the networks of torch and Keras, and of the models of your own frameworks.
OURS, OWN = "network_pyfunc", "alacarte.learners.network"

PICKLES = {".pkl", ".pickle", ".cloudpickle", ".joblib", ".pth", ".pt", ".ckpt", ".bin"}

# Bytes of a file in JSON or YAML that describes a model: larger ones would fill the memory before they can be checked.
MAX_METADATA = 2**26
MAX_VALUES = 10**6  # of the metadata and flavors in MLmodel
MAX_WRITTEN = 10**5  # values that stand in MLmodel; reading them takes 3 s
MAX_DIGITS = 20


class _Loader(yaml.SafeLoader):
    """The loader of YAML without the features that let a short file take hours to read. It runs outside the trial."""

    n_values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.n_values += 1
        if self.n_values > MAX_WRITTEN:
            raise UserError(f"{self.name}: more than {MAX_WRITTEN} values; log the model again")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):  # each can repeat a list of others
            raise UserError(f"{self.name}: merge keys of YAML (<<) are not read; log the model again")
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:  # base 60 takes quadratic time, and so do keys with one hash
            raise UserError(f"{self.name}: a whole number of more than {MAX_DIGITS} digits; log the model again")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load(folder: Path, trust_code: bool = False) -> tuple[str, Any, PyFuncModel]:
    """("sklearn", estimator, model), ("network", NetworkModel, model) or, with trust_code, ("code", None, model).

    "sklearn" is made from skops by alacarte.formats.check. "network" is made from net.json and weights by the classes of this
    checkout, from a .keras file with listed layers, or by a learner that a module of `project` registers. None of them imports
    anything that the folder brings. "code" is every other model, which runs code from its folder. Raises UserError for
    everything else.
    """
    try:
        return _load(folder, trust_code)
    except UserError:
        raise
    except Exception as error:  # forged or broken folders fail in all ways
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: cannot be loaded: {type(error).__name__}: {reason}") from error


def read_description(folder: Path) -> Model:
    """The file MLmodel. UserError if it is too large, or stands for too many values."""
    if (size := (folder / "MLmodel").stat().st_size) > MAX_METADATA:
        raise UserError(f"{folder}: MLmodel has {size} bytes, allowed are {MAX_METADATA}")
    with (folder / "MLmodel").open(encoding="utf-8") as file:
        meta = Model.from_dict(yaml.load(file, _Loader))
    # In YAML a list can be named and used many times, also in itself: a short file can stand for endless values.
    branches, count = [meta.metadata, meta.flavors, meta.saved_input_example_info], 0
    while branches:
        branch = branches.pop()
        if isinstance(branch, dict | list | tuple):
            branches.extend(branch.values() if isinstance(branch, dict) else branch)
        if (count := count + 1) > MAX_VALUES:
            raise UserError(f"{folder}: MLmodel has more than {MAX_VALUES} values; log the model again")
    return meta


def _load(folder: Path, trust_code: bool) -> tuple[str, Any, PyFuncModel]:
    _check_files(folder)
    meta = read_description(folder)
    flavor, sklearn, torch = (meta.flavors.get(name, {}) for name in ("python_function", "sklearn", "pytorch"))
    if not flavor:
        raise UserError(f"{folder}: flavors {sorted(meta.flavors)}; python_function is missing, which MLflow serves")
    if meta.signature is None or not meta.signature.inputs:
        raise UserError(f"{folder}: no signature; log the model with signature= or input_example=")
    _check_example(folder, meta)
    loader = flavor.get("loader_module")
    with_code = any(part.get("code") for part in (flavor, sklearn, torch))
    if loader == "mlflow.sklearn":  # code in the folder is for stock MLflow and is not used here
        try:
            _check_sklearn(folder, flavor, sklearn)
            estimator = formats.load_skops(folder / "model.skops")
            return "sklearn", estimator, _wrap(folder, meta, estimator, flavor.get("predict_fn", "predict"))
        except UserError:
            if not (with_code and trust_code):
                raise
    if loader in (OURS, OWN) and not torch.get("code") and flavor.get("data") == "data/network":
        _check_pickles(folder)
        network = _load_network(folder / "data/network", meta, loader)
        return "network", network, _wrap(folder, meta, network, "predict")
    if not trust_code:
        kind = "a torch program (pt2), which runs code when it is opened" if loader == "mlflow.pytorch" else loader
        raise UserError(
            f"{folder}: loads through {kind}{' with code of its own' if with_code else ''}; allowed are skops and"
            " the networks of this project; serve.trust_code=true runs such models in the server"
        )
    return "code", None, mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)


def _load_network(data: Path, meta: Model, loader: str) -> Any:
    if loader == OWN:
        return registered_learner((meta.metadata or {}).get("learner")).load(data)
    if (data / "model.keras").is_file():
        from alacarte.formats.keras_network import KerasNetwork

        return KerasNetwork.load(data)
    import_extra("torch")
    from alacarte.formats.torch_network import TorchNetwork

    return TorchNetwork.load(data)


def _wrap(folder: Path, meta: Model, implementation: Any, predict_fn: str) -> PyFuncModel:
    model = PyFuncModel(meta, implementation, predict_fn, model_id=meta.model_id)
    if meta.saved_input_example_info:
        model.input_example = meta.load_input_example(str(folder))
    return model


def _check_files(folder: Path) -> None:
    """Plain files and folders only: a link can lead out of the folder, and a pipe or a device never ends."""
    if not (folder / "MLmodel").is_file():
        raise UserError(f"{folder}: no file MLmodel in it, so not an MLflow model folder")
    for file in folder.rglob("*"):
        state, name = file.lstat(), file.relative_to(folder)
        if stat.S_ISLNK(state.st_mode):
            raise UserError(f"{folder}: {name} is a symbolic link; allowed are plain files: log the model again")
        if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
            raise UserError(f"{folder}: {name} is neither a file nor a folder; log the model again")
        if (file.suffix in (".json", ".yaml") or file.name == "MLmodel") and state.st_size > MAX_METADATA:
            raise UserError(f"{folder}: {name} has {state.st_size} bytes, allowed are {MAX_METADATA}")


def _check_pickles(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.suffix.lower() in PICKLES:
            raise UserError(f"{file}: pickles are not loaded; log the model again as skops")


def _check_sklearn(folder: Path, flavor: dict, sklearn: dict) -> None:
    # MLflow takes a flavor without a format for a pickle, and a file can be both a zip and a pickle.
    form = sklearn.get("serialization_format", "pickle")
    if form != "skops":
        raise UserError(f"{folder}: the sklearn flavor in {form}: pickles are not loaded; log the model again as skops")
    _check_pickles(folder)
    paths = {flavor.get("model_path"), sklearn.get("pickled_model")}
    if paths != {"model.skops"}:
        raise UserError(f"{folder}: the model is said to be in {sorted(map(str, paths))}; allowed is model.skops")
    if flavor.get("predict_fn", "predict") not in PREDICT:
        raise UserError(f"{folder}: predict_fn {flavor['predict_fn']!r}; allowed are {', '.join(PREDICT)}")


def _check_example(folder: Path, meta: Model) -> None:
    """The input example is a file of the folder: MLflow would follow any path, or address, that stands there."""
    name = (meta.saved_input_example_info or {}).get("artifact_path", "input_example.json")
    if PurePosixPath(name).name != name or (meta.saved_input_example_info and not (folder / name).is_file()):
        raise UserError(
            f"{folder}: the input example is said to be in {json.dumps(name)[:100]}, which is no file of it"
        )


def check_example(labels: list, metadata: Mapping[str, Any]) -> None:
    """UserError if these answers of a loaded model to its input example differ from the answers logged with it.

    The answers differ if its features or its packages have changed since the training. Numbers may differ a little,
    because another processor rounds differently.
    """
    logged = metadata.get("example_predictions")
    if logged is None or labels == logged:
        return
    with contextlib.suppress(TypeError, ValueError):
        is_number = np.asarray(logged).dtype.kind == "f" and np.shape(labels) == np.shape(logged)
        if is_number and np.allclose(labels, logged, rtol=1e-4, atol=1e-6, equal_nan=True):
            return
    raise UserError(
        "its answers on its input example are not those logged with it: has its code in project/, or a package, changed "
        "since it was trained? Restore it, or train again"
    )
