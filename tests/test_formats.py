"""What is refused is refused before anything is made of it; what the families need is accepted."""

import io
import json
import operator
import os
import shutil
import zipfile
from functools import partial
from pathlib import Path

import mlflow.sklearn
import numpy as np
import pandas as pd
import pytest
from learning import fitted, table
from sklearn.ensemble import RandomForestClassifier
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from alacarte import formats
from alacarte.errors import UserError
from alacarte.learners import load


def dump(model: object, path: Path) -> Path:
    formats.skops_io().dump(model, path)
    return path


def forge(path: Path, node: dict, **more: object) -> Path:
    """A skops file of a StandardScaler one of whose attributes is `node`."""
    buffer = io.BytesIO()
    formats.skops_io().dump(StandardScaler(), buffer)
    with zipfile.ZipFile(buffer) as archive:
        schema = json.loads(archive.read("schema.json"))
    schema["content"]["content"]["copy"] = node
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("schema.json", json.dumps({**schema, **more}))
    return path


def json_node(value: object) -> dict:
    return {"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": json.dumps(value)}


def call(module: str, name: str, *arguments: object) -> dict:
    """A node that calls module.name(*arguments) while the file loads."""
    items = [json_node(value) for value in arguments]
    content = {"__class__": "tuple", "__module__": "builtins", "__loader__": "TupleNode", "content": items}
    return {"__class__": name, "__module__": module, "__loader__": "ConstructorFromReduceNode", "content": content}


@pytest.mark.parametrize(
    "gadget",
    [
        np.load,
        pd.read_pickle,
        os.system,
        partial(np.load, allow_pickle=True),
        operator.methodcaller("to_pickle", "stolen"),
        operator.attrgetter("__class__"),
        RandomForestClassifier().fit,
        io.StringIO,
    ],
)
def test_a_function_that_is_not_named_is_refused(gadget: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"alacarte/formats/check\.py"):
        formats.load_skops(dump(FunctionTransformer(gadget), tmp_path / "model.skops"))


def test_a_call_in_the_file_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """scipy and numpy have classes whose constructor writes a file: skops would call them, once their name is trusted."""
    victim = tmp_path / "victim"
    path = forge(tmp_path / "model.skops", call("scipy.io", "FortranFile", str(victim), "w"))
    skops = formats.skops_io()
    skops.load(path, trusted=skops.get_untrusted_types(file=path))
    assert victim.exists(), "the forged file is no attack any more"
    victim.unlink()
    with pytest.raises(UserError, match=r"FortranFile comes in a ConstructorFromReduceNode"):
        formats.load_skops(path)
    assert not victim.exists()


def test_a_name_in_sklearn_is_accepted_as_an_instance_only(tmp_path: Path) -> None:
    node = {"__class__": "TempMemmap", "__module__": "sklearn.utils._testing", "__loader__": "TypeNode"}
    with pytest.raises(UserError, match=r"needs sklearn\.utils\._testing\.TempMemmap"):
        formats.check_types(forge(tmp_path / "model.skops", node))


def test_an_older_protocol_and_what_is_no_skops_file_are_refused(tmp_path: Path) -> None:
    # protocol 0 names functions where the check does not look
    node = {"__class__": "asarray", "__module__": "numpy", "__loader__": "FunctionNode"}
    node["content"] = {"module_path": "numpy", "function": "asarray"}
    with pytest.raises(UserError, match="protocol 0"):
        formats.check_types(forge(tmp_path / "old.skops", node, protocol=0))
    for content in (b"\x80\x04K\x01.", b"", b"PK\x05\x06" + bytes(18)):
        (tmp_path / "model.skops").write_bytes(content)
        with pytest.raises(UserError, match="not a skops file"):
            formats.check_types(tmp_path / "model.skops")


class Own(StandardScaler):
    pass


def test_a_class_of_ones_own_is_refused_when_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Own.*alacarte/formats/check\.py"):
        formats.save_skops(Own(), tmp_path / "model.skops")


def test_pickles_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    X, y = table("numeric", "classification")
    forest = RandomForestClassifier(3).fit(X, y)
    pickled = tmp_path / "pickled"
    mlflow.sklearn.save_model(forest, str(pickled), serialization_format="cloudpickle", pip_requirements=["skops"])
    with pytest.raises(UserError, match=r"model\.pkl"):
        load(pickled)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="no file MLmodel"):
        formats.inspect(other)
    (other / "MLmodel").write_text("flavors: {onnx: {}}")
    with pytest.raises(UserError, match="onnx"):
        formats.inspect(other)


def test_a_pickle_beside_a_good_model_and_a_false_name_are_refused(tmp_path: Path) -> None:
    X, _ = table("numeric", "classification")
    folder = tmp_path / "model"
    fitted("sklearn_forest", "numeric", "classification").save(folder, example=X.head(3), metadata={})
    assert formats.inspect(folder) == "sklearn"
    (folder / "extra.joblib").write_bytes(b"")
    with pytest.raises(UserError, match=r"extra\.joblib"):
        load(folder)
    (folder / "extra.joblib").unlink()
    (folder / "model.skops").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match="not a skops file"):
        load(folder)


def test_a_foreign_skops_model_loads(tmp_path: Path) -> None:
    X, y = table("numeric", "classification")
    forest = RandomForestClassifier(3, random_state=0).fit(X, y)
    trusted = formats.save_skops(forest, tmp_path / "model.skops")
    mlflow.sklearn.save_model(
        forest,
        str(tmp_path / "m"),
        serialization_format="skops",
        skops_trusted_types=trusted,
        pip_requirements=["skops"],
    )
    found = load(tmp_path / "m")
    assert found.task == "classification" and found.classes == ["high", "low", "mid"]
    assert (found.predict(X) == forest.predict(X)).all()
    assert np.array_equal(found.predict_proba(X), forest.predict_proba(X))
    found.save(tmp_path / "again", example=X.head(2), metadata={})
    assert (mlflow.pyfunc.load_model(str(tmp_path / "again")).predict(X) == forest.predict(X)).all()


def test_a_torch_folder_names_no_class_outside_the_project(tmp_path: Path) -> None:
    X, _ = table("numeric", "classification")
    good = tmp_path / "good"
    fitted("torch_mlp", "numeric", "classification").save(good, example=X.head(3), metadata={})
    assert formats.inspect(good) == "torch"
    for number, target in enumerate(("os.system", "torch.hub.load", "project.data.load_digits", "torch.nn.Missing")):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        net = json.loads((folder / "data/network/net.json").read_text())
        net["network"]["_target_"] = target
        (folder / "data/network/net.json").write_text(json.dumps(net))
        with pytest.raises(UserError, match=r"model\.network\._target_"):
            load(folder)
