"""Model folders: the steps and the server load the same ones, refuse the same ones, and run nothing that is in them."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import mlflow.pytorch
import mlflow.sklearn
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from bodies import JSON
from learning import fitted, table
from mlflow.models import infer_signature
from safetensors.torch import load_file, save_file
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from test_model import ask_mlflow, numeric_table, ours, save_sklearn

from alacarte import learners
from alacarte.errors import UserError
from alacarte.formats.load import load
from alacarte.serving.model import ServedModel

# The loaders of the steps and of the server: both call `load`.
LOADERS: tuple[Callable[[Path], Any], ...] = (learners.load, lambda folder: ServedModel.load(folder, trust_code=False))


def refused(folder: Path, output: str, loaders: tuple[Callable[[Path], Any], ...] = (load,)) -> None:
    for loader in loaders:
        with pytest.raises(UserError, match=output) as error:
            loader(folder)
        assert "\n" not in str(error.value)


def edit(folder: Path, **changes: Any) -> Path:
    """Change the MLmodel of a folder; `python_function={"code": ...}` changes one key of a flavor."""
    content = yaml.safe_load((folder / "MLmodel").read_text())
    for flavor, keys in changes.items():
        target = content["flavors"].get(flavor, content)
        for key, value in keys.items():
            target.pop(key, None) if value is None else target.update({key: value})
    (folder / "MLmodel").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders small and torch, of which each test gets a copy."""
    root, (X, y) = tmp_path_factory.mktemp("models"), numeric_table()
    save_sklearn(root / "small", LogisticRegression().fit(X, y), X)
    X, _ = table("mixed", "classification")
    fitted("torch_mlp", "mixed", "classification").save(root / "torch", example=X.head(3), metadata={})
    return root


@pytest.fixture
def small(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "small", tmp_path / "small")


@pytest.fixture
def ours_in_torch(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "torch", tmp_path / "torch")


# --- folders ---


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        ({"sklearn": {"serialization_format": None}}, "pickle"),
        ({"sklearn": {"serialization_format": "cloudpickle"}}, "pickles are not loaded"),
        ({"python_function": {"model_path": "../other.skops"}}, "allowed is model.skops"),
        ({"sklearn": {"pickled_model": "other.skops"}}, "allowed is model.skops"),
        ({"python_function": {"loader_module": "antigravity"}}, "loads through antigravity"),
        ({"python_function": {"loader_module": "antigravity", "code": "code"}}, "with code of its own"),
        ({"python_function": {"predict_fn": "__class__"}}, "predict_fn '__class__'"),
        ({"whole": {"signature": None}}, "no signature"),
        ({"whole": {"saved_input_example_info": {"artifact_path": "../../x", "type": "dataframe"}}}, "input example"),
        ({"whole": {"flavors": {}}}, "python_function is missing"),
    ],
)
def test_folders_that_are_not_loaded(changes: dict, output: str, small: Path) -> None:
    refused(edit(small, **changes), output)


def test_files_that_are_not_loaded(small: Path, tmp_path: Path) -> None:
    refused(tmp_path, "no file MLmodel")
    (small / "extra.joblib").write_bytes(b"")
    refused(small, r"extra\.joblib: pickles are not loaded")
    (small / "extra.joblib").unlink()
    (small / "model.skops").write_bytes(b"nothing")
    refused(small, "not a skops file")
    (small / "MLmodel").write_text("flavors: [")
    refused(small, "cannot be loaded")
    X, y = numeric_table()
    pickled = save_sklearn(tmp_path / "pickled", LogisticRegression().fit(X, y), X, serialization_format="cloudpickle")
    refused(pickled, "pickles are not loaded", LOADERS)
    with pytest.raises(UserError, match="pickles are not loaded"):
        load(pickled, trust_code=True)


@pytest.mark.parametrize("name", ["MLmodel", "model.skops", "input_example.json", "code/deep/secret", "code"])
def test_a_symbolic_link_is_refused(name: str, small: Path, tmp_path: Path) -> None:
    """At any depth, to a file or a folder, whether the file is one of the model's or not: with trust_code as well."""
    (small / name).parent.mkdir(parents=True, exist_ok=True)
    if (small / name).exists():
        (small / name).rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").mkdir()
    (small / name).symlink_to(tmp_path / "elsewhere")
    refused(small, f"{name} is a symbolic link", LOADERS)
    with pytest.raises(UserError, match="symbolic link"):
        load(small, trust_code=True)


def test_a_pipe_and_metadata_without_end_are_refused(small: Path) -> None:
    os.mkfifo(small / "pipe")
    refused(small, "pipe is neither a file nor a folder")
    (small / "pipe").unlink()
    with (small / "MLmodel").open("r+b") as file:
        file.truncate(2**27)
    refused(small, "MLmodel has 134217728 bytes")


def test_a_foreign_skops_model_loads(tmp_path: Path) -> None:
    X, y = table("numeric", "classification")
    forest = RandomForestClassifier(3, random_state=0).fit(X, y)
    save_sklearn(tmp_path / "m", forest, X, skops_trusted_types=["sklearn.tree._tree.Tree", "numpy.dtype"])
    learner = learners.load(tmp_path / "m")
    assert learner.task == "classification" and learner.classes == ["high", "low", "mid"]
    assert (learner.predict(X) == forest.predict(X)).all()
    assert np.array_equal(learner.predict_proba(X), forest.predict_proba(X))
    learner.save(tmp_path / "again", example=X.head(2), metadata={})
    assert (mlflow.pyfunc.load_model(str(tmp_path / "again")).predict(X) == forest.predict(X)).all()


# --- code ---


class Doubles(mlflow.pyfunc.PythonModel):
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict | None = None) -> list:
        return [value * (params or {"times": 2})["times"] for value in model_input["a"]]


def test_code_needs_trust(tmp_path: Path) -> None:
    X = pd.DataFrame({"a": [1.0, 2.0]})
    signature = infer_signature(X, [2.0, 4.0], params={"times": 2})
    mlflow.pyfunc.save_model(
        tmp_path / "code", python_model=Doubles(), signature=signature, input_example=X, pip_requirements=["mlflow"]
    )
    refused(tmp_path / "code", r"serve\.trust_code=true", LOADERS)
    model = ServedModel.load(tmp_path / "code", trust_code=True)
    model.find_fast_path()
    assert model.path_in_use == "pyfunc" and model.task is None and model.probabilities is not None
    body = {"dataframe_split": {"columns": ["a"], "data": [[3.0]]}}
    assert ours(model, JSON, json.dumps(body).encode()) == [6.0]
    assert ours(model, JSON, json.dumps({**body, "params": {"times": 5}}).encode()) == [15.0]
    assert ours(model, JSON, json.dumps({**body, "params": {"times": "many"}}).encode()) is None


def forge_program(program: Path, marker: Path) -> None:
    """Change one expression in a pt2 file, so that opening it makes the file `marker`."""
    with zipfile.ZipFile(program) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    text = json.dumps(f"__import__('pathlib').Path({str(marker)!r}).touch() or 3")
    with zipfile.ZipFile(program, "w") as archive:
        for info, content in members:
            if info.filename.endswith("models/model.json"):
                tree = content.decode()
                start = tree.index('"expr_str": ') + len('"expr_str": ')
                content = (tree[:start] + text + tree[tree.index('"', start + 1) + 1 :]).encode()
            archive.writestr(info.filename, content)


def pt2_model(folder: Path) -> Path:
    X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    mlflow.pytorch.save_model(
        network, folder, serialization_format="pt2", input_example=X, pip_requirements=["torch"],
        signature=infer_signature(X, network(torch.from_numpy(X)).detach().numpy()),
    )  # fmt: skip
    return folder


def test_pt2_models_of_others_need_trust(tmp_path: Path) -> None:
    folder = pt2_model(tmp_path / "pt2")
    refused(folder, r"a torch program \(pt2\), which runs code when it is opened; .*serve\.trust_code=true", LOADERS)
    model, pyfunc = ServedModel.load(folder, trust_code=True), mlflow.pyfunc.load_model(str(folder))
    body = json.dumps({"inputs": [[1.0, 2.0, 3.0], [0.5, 0.25, -1]]}).encode()
    expected = ask_mlflow(pyfunc, JSON, body)
    assert expected and ours(model, JSON, body) == expected
    assert model.parse(body, JSON, 10).encode(frozenset())[0] == "f8"


# --- our torch models ---


def test_a_forged_program_is_never_opened(ours_in_torch: Path, tmp_path: Path) -> None:
    marker, X = tmp_path / "marker", table("mixed", "classification")[0]
    expected = learners.load(ours_in_torch).predict(X)
    forge_program(ours_in_torch / "data/network/model.pt2", marker)
    assert (learners.load(ours_in_torch).predict(X) == expected).all()
    served = ServedModel.load(ours_in_torch, trust_code=False)
    assert served.predict_example() == expected[:3].tolist()
    assert not marker.exists()
    with pytest.raises(Exception, match=r".*"):  # torch reads the expression, and then finds no number in it
        torch.export.load(ours_in_torch / "data/network/model.pt2")
    assert marker.exists(), "the forged file is no attack any more"


def test_the_code_in_the_folder_is_not_run(ours_in_torch: Path) -> None:
    (ours_in_torch / "code/network_pyfunc.py").write_text("raise SystemExit('code of the folder')")
    for loader in LOADERS:
        loader(ours_in_torch)


def change_net(folder: Path, **changes: Any) -> None:
    file = folder / "data/network/net.json"
    net = json.loads(file.read_text())
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            net[part][name] = value
        else:
            net[part] = value
    file.write_text(json.dumps(net))


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "torch.hub.load", "torch.nn.Linear", "torch.nn.modules.linear.Linear", "collections.Counter"),
        *("project.data.load_digits", "project.networks.nn.Linear", "project.networks.torch.nn.Linear"),
        *("project.networks.nn", "project.networks.MLP.__init__", "project.networks", "project.missing.MLP", "MLP", ""),
        *(
            "alacarte.serving.fastpath.estimators.NotKnown",
            "alacarte.formats.torch_network.nn",
            "projects.networks.MLP",
        ),
    ],
)
def test_a_class_that_is_no_network_of_the_checkout_is_refused(target: str, ours_in_torch: Path) -> None:
    change_net(ours_in_torch, **{"network___target_": target})
    refused(ours_in_torch, r"model\.network\._target_=")


@pytest.mark.parametrize(
    ("changes", "output"),
    [
        ({"network__hidden": [10**12]}, "weights do not fit"),  # 100 GB and more: refused before it is asked for
        ({"network__hidden": [2**20, 2**20]}, "weights do not fit"),
        ({"network__hidden": [1] * 10_000}, "characters of arguments"),
        ({"network__hidden": {"a": 1}}, "weights do not fit"),
        ({"n_inputs": 2**40}, r"Expected `int` <= 16777216"),
        ({"n_inputs": "7"}, "Expected `int`, got `str`"),
        ({"n_outputs": 2}, "contradict each other"),
        ({"task": "regression"}, "contradict each other"),
        ({"classes": [["a"], ["b"], ["c"]]}, "Expected `.*`, got `array`"),
        ({"settings__lr": "fast"}, "model.lr=fast: allowed are numbers"),
        ({"settings__device": "cuda"}, "model.device: the settings are"),
        ({"network": []}, "Expected `object`, got `array`"),
    ],
)
def test_a_description_that_fits_nothing_is_refused(changes: dict, output: str, ours_in_torch: Path) -> None:
    change_net(ours_in_torch, **changes)
    refused(ours_in_torch, output)


def test_weights_that_do_not_fit_are_refused(ours_in_torch: Path) -> None:
    file = ours_in_torch / "data/network/weights.safetensors"
    save_file({**load_file(file), "extra": torch.zeros(1)}, file)
    refused(ours_in_torch, r"extra is \(1,\) and should be None")
    file.write_bytes(b"nothing")
    refused(ours_in_torch, "weights do not fit")
    shutil.rmtree(ours_in_torch / "data")
    refused(ours_in_torch, "cannot be loaded: FileNotFoundError")
