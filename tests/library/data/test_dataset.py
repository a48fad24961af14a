"""Data sets: loaders and their config files, columns, the task, the digest, and MLflow's record of them."""

import dataclasses
import decimal
import hashlib
import json
import math
import shutil
import subprocess
import sys
import warnings

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, tracking
from mlflow.utils import validation
from omegaconf import OmegaConf
from people import SPLIT, people, refusal, table

from alacarte.data.dataset import (
    DataReader,
    as_mlflow,
    columns_like_ids,
    load_data,
    recorded,
    source_digest,
    table_as_mlflow,
)
from alacarte.errors import UserError


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "people.csv"
    people().to_csv(path, index=False)
    return path


def test_digits_by_its_config_file():
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/data/digits.yaml"))
    digits = load_data(**config)
    assert digits.X.shape == (1797, 64) and digits.task == "classification" and digits.name == "digits"
    assert digits.y.head(10).tolist() == list(range(10)), "not in file order"
    assert digits.source == "sklearn.datasets.load_digits"
    rotated = load_data(**{**config, "rotate": 25, "start": 900})
    assert len(rotated.X) == 897 and not np.allclose(rotated.X, digits.X[900:])
    assert rotated.y.tolist() == digits.y[900:].tolist()
    assert source_digest(**config) == source_digest(**config) != source_digest(**{**config, "rotate": 25})


def test_table_config_file_needs_path_and_target(csv):
    config = OmegaConf.load(ROOT / "conf/data/table.yaml")
    assert OmegaConf.missing_keys(config) == {"path", "target"}
    settings = OmegaConf.to_container(OmegaConf.merge(config, {"path": str(csv), "target": "y"}))
    assert load_data(**settings).digest == table(csv).digest
    assert source_digest(**settings) == hashlib.sha256(csv.read_bytes()).hexdigest()


def test_bad_columns(csv, tmp_path):
    message = refusal(table, csv, target="Incom")
    assert "data.target=Incom" in message and "'income'" in message
    message = refusal(table, csv, target="qqqqqq")
    assert "age, income, member" in message
    assert "data.split is missing" in refusal(table, csv, split=None)
    assert "data.key=citi" in refusal(table, csv, key="citi")
    assert "data.drop=agee" in refusal(table, csv, drop=["agee"])
    assert "data.target=y is also in data.key" in refusal(table, csv, key="y")
    assert "data.target=y is also in data.drop" in refusal(table, csv, drop=["y"])
    people().assign(note=np.nan).to_csv(tmp_path / "note.csv", index=False)
    assert "'note' has no value" in refusal(table, tmp_path / "note.csv")
    assert "note" not in table(tmp_path / "note.csv", drop=["note"]).X
    assert "income" not in table(csv, drop=["income"], key="since").X
    assert list(table(csv, drop="age").X) == list(table(csv, drop=["age"]).X)
    assert table(csv, drop=None).digest == table(csv).digest


def test_missing_targets_are_left_out(tmp_path, caplog):
    frame = people()
    frame.loc[:9, "y"] = None
    frame.to_csv(tmp_path / "t.csv", index=False)
    dataset = table(tmp_path / "t.csv")
    assert len(dataset.X) == len(dataset.y) == len(dataset.split) == 290 and dataset.y.notna().all()
    assert "10 of 300 rows" in caplog.text and "data.target=y" in caplog.text
    frame.assign(y=None).to_csv(tmp_path / "t.csv", index=False)
    assert "none of the 300 rows" in refusal(table, tmp_path / "t.csv")


def test_infinite_inputs_count_as_missing(tmp_path, caplog):
    frame = people()
    frame.loc[:4, "income"] = np.inf
    frame.to_parquet(tmp_path / "t.parquet")
    assert table(tmp_path / "t.parquet").X["income"].isna().sum() == 5
    assert "'income': 5 infinite" in caplog.text


def test_numbers_as_column_names(monkeypatch):
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(99, 3))).assign(**{"3": ["a", "b", "c"] * 33})
    monkeypatch.setattr("project.data.load_digits", lambda: frame)
    arguments = {"_target_": "project.data.load_digits", "split": SPLIT}
    dataset = load_data(**arguments, target=3)
    assert list(dataset.X) == ["0", "1", "2"] and dataset.target == "3" and dataset.name == "load_digits"
    monkeypatch.setattr("project.data.load_digits", lambda: frame.set_axis(["0", 0, 1, "3"], axis=1))
    assert "more than one column 0" in refusal(load_data, **arguments, target=3)
    monkeypatch.setattr("project.data.load_digits", lambda: [1])
    assert "returns list" in refusal(load_data, **arguments, target=3)


def test_bad_loaders(csv):
    assert "data._target_=project.data.load_nothing" in refusal(table, csv, _target_="project.data.load_nothing")
    assert "data._target_=nowhere.load" in refusal(table, csv, _target_="nowhere.load")
    message = refusal(table, csv, roate=3)
    assert "roate" in message and "path, separator" in message


# --- the task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "task", "dtype"),
    [
        (["a", "b", "c"], "classification", "str"),
        ([True, False, True], "classification", "bool"),
        ([0, 1, 2], "classification", "int64"),
        ([0.0, 1.0, 2.0], "classification", "int64"),
        (pd.array([0, 1, 2], dtype="Int64"), "classification", "int64"),
        (pd.Categorical([7, 8, 9]), "classification", "int64"),
        (pd.Categorical(["a", "b", "c"]), "classification", "str"),
        ([0.5, 1.0, 1.5], "regression", "float64"),
        ([decimal.Decimal("1.5"), decimal.Decimal(2), decimal.Decimal(3)], "regression", "float64"),
        (range(300), "regression", "float64"),
        ([1e300, 2e300, 3e300], "regression", "float64"),
        (range(1, 21), "classification", "int64"),
        (range(1, 22), "regression", "float64"),
    ],
)
def test_the_task_follows_the_target(tmp_path, values, task, dtype):
    values = pd.Series(values)
    n = 100 * len(values) if len(values) < 100 else len(values)
    y = values.take(np.arange(n) % len(values)).reset_index(drop=True)
    people(n).assign(y=y).to_parquet(tmp_path / "t.parquet")
    dataset = table(tmp_path / "t.parquet")
    assert (dataset.task, str(dataset.y.dtype)) == (task, dtype)
    assert table(tmp_path / "t.parquet", task=task).digest == dataset.digest


def test_integers_that_miss_or_hardly_repeat(tmp_path):
    people().assign(y=pd.Series([0, 1, None] * 100, dtype="Int64")).to_csv(tmp_path / "t.csv", index=False)
    y = table(tmp_path / "t.csv").y
    assert sorted(y.unique().tolist()) == [0, 1] and y.dtype == "int64"
    people(40, seed=1).assign(y=[*range(10)] * 4).to_csv(tmp_path / "t.csv", index=False)
    assert table(tmp_path / "t.csv").task == "regression", "they are quantities"


def test_bad_targets(tmp_path):
    path = tmp_path / "t.parquet"

    def refused(values, **settings):
        people().assign(y=values).to_parquet(path)
        message = refusal(table, path, **settings)
        assert "data.target=y" in message or "y=" in message
        return message

    assert "all 300 rows hold a" in refused("a")
    assert "all 300 rows hold 1.5" in refused(1.5)
    assert "100 of 300 rows are infinite" in refused([1.5, 2.5, math.inf] * 100)
    assert "dates" in refused(pd.date_range("2020", periods=300))
    assert "100 of 300 rows, such as 'n/a'" in refused(["1", "2", "n/a"] * 100, task="regression")
    assert "fractions, such as 0.5" in refused([0.5, 1.0, 2.0] * 100, task="classification")
    assert "data.task=clasification" in refusal(table, path, task="clasification")
    people().assign(y=["1", "2.5", "3"] * 100).to_parquet(path)
    assert set(table(path, task="regression").y) == {1.0, 2.5, 3.0}


# --- digest and MLflow -----------------------------------------------------------------------------------------------


def test_the_digest_follows_content(csv, tmp_path):
    dataset = table(csv)
    assert len(dataset.digest) == 16 and dataset.digest == table(csv, name="other").digest
    assert dataset.digest != table(csv, split={**SPLIT, "seed": 1}).digest
    assert dataset.digest != table(csv, target="city").digest
    assert dataset.digest != table(csv, drop=["age"]).digest
    changed = people()
    changed.loc[5, "income"] += 1e-9
    as_floats = people().assign(age=people()["age"] * 1.0)
    for frame in (changed, people()[::-1], people().rename(columns={"age": "Age"}), as_floats):
        frame.to_csv(tmp_path / "t.csv", index=False)
        assert table(tmp_path / "t.csv").digest != dataset.digest


def test_mlflow_records_the_digest_of_each_part(csv, tmp_path, caplog, empty_store):
    store, dataset = f"sqlite:///{shutil.copy(empty_store, tmp_path)}", table(csv)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged = {part: as_mlflow(dataset, part) for part in ("train", "val", "test")}
        [part._to_mlflow_entity() for part in logged.values()]
    assert not caplog.records
    with tracking(store), mlflow.start_run() as run:
        for part, value in logged.items():
            mlflow.log_input(value, context=part)
    inputs = mlflow.MlflowClient(store).get_run(run.info.run_id).inputs.dataset_inputs
    recorded = {entry.tags[0].value: entry.dataset for entry in inputs}
    assert recorded.keys() == logged.keys()
    for part, entry in recorded.items():
        assert entry.digest == dataset.digest and entry.name == f"people_{part}" and entry.source_type == "local"
        assert str(csv) in entry.source and json.loads(entry.profile)["num_rows"] == (dataset.split == part).sum()
        assert "income" in entry.schema


def test_a_table_of_many_columns_is_recorded_without_its_schema(csv, monkeypatch):
    """MLflow stores at most a million characters of a schema."""
    monkeypatch.setattr(validation, "MAX_DATASET_SCHEMA_SIZE", 100)
    for logged in (as_mlflow(table(csv), "train"), table_as_mlflow(people(), str(csv), "0" * 64)):
        entity = logged._to_mlflow_entity()
        validation._validate_dataset(entity)  # what a store does before it writes
        assert entity.schema is None and json.loads(entity.profile)["num_rows"] > 0


@pytest.mark.parametrize(
    ("source", "kind"),
    [("s3://b/x.csv", "s3"), ("hf://datasets/a.csv", "code"), ("zip://a.csv::x.zip", "code"), ("memory://b/x.csv", "code"),
     ("https://h/x.csv", "http")],
)  # fmt: skip
def test_mlflow_takes_any_source(csv, source, kind):
    logged = as_mlflow(dataclasses.replace(table(csv), source=source), "train")
    assert logged.digest == table(csv).digest and source in logged.to_json().replace("\\", "")
    assert logged._to_mlflow_entity().source_type == kind


def test_neither_mlflow_nor_torch_is_imported_to_load():
    code = "import sys, alacarte.data.dataset, project.data; print(*{'mlflow', 'torch', 'sklearn', 'scipy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == ""


@pytest.mark.parametrize(
    "target", ["os.system", "pandas.read_pickle", "project.data.np.load", "alacarte.data.tables.Path", "project.nope"]
)
def test_a_model_cannot_name_what_is_called(target: str):
    with pytest.raises(UserError, match="no function of project/"):
        recorded({"_target_": target})
    data = {"_target_": "project.data.load_digits", "start": 1}
    assert recorded(data) == data


def test_data_that_were_read_with_the_types_of_a_model_have_not_changed(csv):
    """As after `retrain data=...`: without the types, the codes 007 and 012 would be numbers."""
    people().assign(code=["007", "012"] * 150).to_csv(csv, index=False)
    data = {"_target_": "alacarte.data.tables.read_table", "path": str(csv), "target": "y", "split": SPLIT}
    types = {"code": "string"} | dict.fromkeys(people(), "any")
    dataset = DataReader()(data, types)
    model = {"data": data, "column_types": types, **dataset.metadata}
    assert DataReader().recorded(model, "the champion").X["code"].equals(dataset.X["code"])


def test_a_text_in_each_row_of_its_own_is_named():
    numbers = np.arange(200)
    frame = pd.DataFrame({"id": [f"c{n}" for n in numbers], "city": ["Bonn", "Lyon"] * 100, "income": numbers})
    assert columns_like_ids(frame) == ["id"] and columns_like_ids(frame[:50]) == []
