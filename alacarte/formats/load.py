"""Which model folders are served: what is checked before anything in a folder is made, imported or run."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow.pyfunc
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel

from alacarte import formats
from alacarte.errors import UserError

# What MLflow's sklearn flavor may be told to call, where it gives one answer a row.
PREDICT = ("predict", "predict_proba", "predict_log_proba", "predict_joint_log_proba")


def load(folder: Path, trust_code: bool) -> tuple[str, Any, PyFuncModel]:
    """("sklearn", estimator, model), ("torch", learners.torch_pyfunc.Predictor, model), or ("pt2" | "code", None, model).

    "sklearn" is made from skops by alacarte.formats.check, "torch" by the code that is installed here: neither imports anything
    that the folder names. "pt2" is MLflow's pytorch flavor without a pickle in it. "code" needs trust_code. Raises
    UserError for everything else.
    """
    try:
        return _load(folder, trust_code)
    except UserError:
        raise
    except Exception as error:  # forged or broken folders fail in all ways
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: cannot be loaded: {type(error).__name__}: {reason}") from error


def _load(folder: Path, trust_code: bool) -> tuple[str, Any, PyFuncModel]:
    if not (folder / "MLmodel").is_file():
        raise UserError(f"{folder}: no file MLmodel in it, so not an MLflow model folder")
    meta = Model.load(str(folder / "MLmodel"))
    flavor, sklearn, torch = (meta.flavors.get(name, {}) for name in ("python_function", "sklearn", "pytorch"))
    if not flavor:
        raise UserError(f"{folder}: flavors {sorted(meta.flavors)}; python_function is missing, which MLflow serves")
    if meta.signature is None or not meta.signature.inputs:
        raise UserError(f"{folder}: no signature; log the model with signature= or input_example=")
    _check_example(folder, meta)
    loader = flavor.get("loader_module")
    with_code = any(part.get("code") for part in (flavor, sklearn, torch))
    if loader == "mlflow.sklearn" and not with_code:
        _check_sklearn(folder, flavor, sklearn)
        estimator = formats.load_skops(folder / "model.skops")
        return "sklearn", estimator, _wrap(folder, meta, estimator, flavor.get("predict_fn", "predict"))
    if loader == "torch_pyfunc" and not torch.get("code") and _is_ours(folder, flavor, torch):
        from alacarte.learners.torch_pyfunc import Predictor

        formats.check_types(folder / "data/network/preprocess.skops")
        _check_pt2(folder / "data/network/model.pt2")
        predictor = Predictor(folder / "data/network")
        return "torch", predictor, _wrap(folder, meta, predictor, "predict")
    if loader == "mlflow.pytorch" and not with_code:
        _check_pytorch(folder, flavor, torch)
        return "pt2", None, mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)
    if not trust_code:
        raise UserError(
            f"{folder}: loads through {loader}{' with code of its own' if with_code else ''}; allowed are skops, pt2 and"
            " model=torch_mlp; serve.trust_code=true runs such models here"
        )
    return "code", None, mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)


def _wrap(folder: Path, meta: Model, implementation: Any, predict_fn: str) -> PyFuncModel:
    model = PyFuncModel(meta, implementation, predict_fn, model_id=meta.model_id)
    if meta.saved_input_example_info:
        model.input_example = meta.load_input_example(str(folder))
    return model


def _check_sklearn(folder: Path, flavor: dict, sklearn: dict) -> None:
    # MLflow takes a flavor without a format for a pickle, and a file can be both a zip and a pickle.
    if sklearn.get("serialization_format") != "skops" or formats.inspect(folder) != "sklearn":
        found = sklearn.get("serialization_format", "pickle")
        raise UserError(
            f"{folder}: the sklearn flavor in {found}: pickles are not loaded; log the model again as skops"
        )
    paths = {flavor.get("model_path"), sklearn.get("pickled_model")}
    if paths != {"model.skops"}:
        raise UserError(f"{folder}: the model is said to be in {sorted(map(str, paths))}; allowed is model.skops")
    if flavor.get("predict_fn", "predict") not in PREDICT:
        raise UserError(f"{folder}: predict_fn {flavor['predict_fn']!r}; allowed are {', '.join(PREDICT)}")


def _is_ours(folder: Path, flavor: dict, torch: dict) -> bool:
    data = flavor.get("data") == torch.get("model_data") == "data/network"
    return data and flavor.get("predict_fn", "predict") == "predict" and formats.inspect(folder) == "torch"


def _check_pytorch(folder: Path, flavor: dict, torch: dict) -> None:
    pickles = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in formats.PICKLES)
    data = str(flavor.get("data"))
    path = PurePosixPath(data)
    if pickles or path.is_absolute() or ".." in path.parts or torch.get("model_data") != data:
        raise UserError(
            f"{folder}: {', '.join(pickles) or data}: not a pt2 model; log it with serialization_format='pt2'"
        )
    _check_pt2(folder / data / "model.pt2")


def _check_pt2(file: Path) -> None:
    """Refuse a program with a pickle inside, as MLflow itself does only where the environment asks for it."""
    from mlflow.pytorch import _validate_pt2_archive_is_pickle_free

    if not file.is_file():
        raise UserError(f"{file}: there is no such file; log the model with serialization_format='pt2'")
    _validate_pt2_archive_is_pickle_free(str(file))


def _check_example(folder: Path, meta: Model) -> None:
    """The input example is a file of the folder: MLflow would follow any path, or address, that stands there."""
    name = (meta.saved_input_example_info or {}).get("artifact_path", "input_example.json")
    if PurePosixPath(name).name != name or (meta.saved_input_example_info and not (folder / name).is_file()):
        raise UserError(
            f"{folder}: the input example is said to be in {json.dumps(name)[:100]}, which is no file of it"
        )
