"""Two models are compared on rows that neither was trained on, with the labels of the champion's data."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from people import SPLIT, people, refusal

from alacarte.data import dataset as datasets
from alacarte.data.dataset import DataReader, Dataset
from alacarte.evaluation.rows import JudgingRows, check_record, choose_rows, describe, leave_out_trained, own_rows
from alacarte.feedback.queries import Labelled


@pytest.fixture
def file(tmp_path: Path) -> Path:
    people(600).to_csv(tmp_path / "people.csv", index=False)
    return tmp_path / "people.csv"


def recorded(read: DataReader, path: Path, **more: Any) -> dict[str, Any]:
    """What a model records that was trained on a file."""
    data = {"_target_": "alacarte.data.tables.read_table", "path": str(path), "target": "y", "split": SPLIT, **more}
    return {"data": data, **read(data).metadata}


def rows_for(champion: dict, challenger: dict, read: DataReader, data: dict | None = None, **more: Any) -> JudgingRows:
    return choose_rows(champion, challenger, read, **{"data": data, "labelled": None, "min_rows": 30, **more})


def keys(X: pd.DataFrame, y: pd.Series | None = None) -> set[tuple]:
    table = X[["age", "income", "city"]]
    return set((table if y is None else table.assign(y=y)).itertuples(index=False, name=None))


def trained_on(dataset: Dataset) -> set[tuple]:
    return keys(dataset.X[dataset.is_trained_on])


def test_with_the_same_data_all_test_rows_judge_and_are_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    load = datasets.load_data
    monkeypatch.setattr(datasets, "load_data", lambda **data: reads.append(data) or load(**data))
    read = DataReader()
    model = recorded(read, file)
    rows = rows_for(model, model, read)
    X, y = read(model["data"]).part("test")
    pd.testing.assert_frame_equal(rows.dataset.part("test")[0], X)
    assert rows.dataset.part("test")[1].equals(y) and rows.for_champion.equals(X) and rows.for_challenger.equals(X)
    assert describe(rows.report) == [] and len(reads) == 1


def test_with_another_split_only_rows_that_trained_neither_judge(file: Path) -> None:
    read = DataReader()
    champion, challenger = recorded(read, file), recorded(read, file, split=SPLIT | {"seed": 1, "test": 0.4})
    rows = rows_for(champion, challenger, read)
    X, _ = rows.dataset.part("test")
    parts = [read(model["data"]) for model in (champion, challenger)]
    assert keys(X) == keys(parts[0].part("test")[0]) & keys(parts[1].part("test")[0])
    assert not keys(X) & (trained_on(parts[0]) | trained_on(parts[1]))
    (sentence,) = describe(rows.report)
    left_out = len(parts[0].part("test")[0]) - len(X)
    assert f"{len(X)} of " in sentence and f"{left_out} that the challenger was trained on" in sentence


def test_a_dropped_column_changes_the_split_and_the_champion_gets_its_column_back(file: Path) -> None:
    read = DataReader()
    champion = recorded(read, file, split=SPLIT | {"test": 0.4})
    challenger = recorded(read, file, drop=["since"], split=SPLIT | {"test": 0.4})
    for data in (None, challenger["data"]):  # as recorded, and as `main` hands its own data on
        rows = rows_for(champion, challenger, read, data)
        X, _ = rows.dataset.part("test")
        whole, dropped = read(champion["data"]), read(challenger["data"])
        assert keys(X) == keys(whole.part("test")[0]) & keys(dropped.part("test")[0]) and len(X) >= 30
        own = whole.X.set_index(["age", "income", "city"])["since"]
        expected = own.loc[list(X[["age", "income", "city"]].itertuples(index=False, name=None))]
        assert rows.for_champion["since"].tolist() == expected.tolist()
        assert len(rows.for_champion) == len(rows.for_challenger) == len(X)


def test_labels_and_rows_of_the_challengers_own_data_prove_nothing(file: Path, tmp_path: Path) -> None:
    read = DataReader()
    champion = recorded(read, file, split=SPLIT | {"test": 0.4})
    shifted = people(600).assign(y=lambda frame: np.where(frame["y"] == "yes", "no", "yes"))
    for name, table in (("shifted", shifted), ("moved", shifted.assign(income=shifted["income"] + 0.001))):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
        challenger = recorded(read, tmp_path / f"{name}.csv", split={"val": 0.05, "test": 0.85, "seed": 4})
        rows = rows_for(champion, challenger, read)
        assert keys(*rows.dataset.part("test")) <= keys(*read(champion["data"]).part("test"))
        assert len(rows.dataset.part("test")[0]) >= 30
    # A column that only the challenger's data have may hold the label: it is missing where the champion's rows judge.
    people(600).assign(hint=people(600)["y"]).to_csv(tmp_path / "hint.csv", index=False)
    challenger = recorded(read, tmp_path / "hint.csv", split={"val": 0.05, "test": 0.85, "seed": 4})
    assert rows_for(champion, challenger, read).for_challenger["hint"].isna().all()


def test_too_few_rows_say_why_and_what_to_do(file: Path) -> None:
    read = DataReader()
    champion, challenger = recorded(read, file), recorded(read, file, drop=["since"])
    message = refusal(rows_for, champion, challenger, read, min_rows=100)
    assert "that the challenger was trained on, and gate.min_test_rows=100 must judge" in message
    assert "data.drop" in message and "-P data=..." in message


def test_rows_that_trained_as_labelled_requests_do_not_judge(file: Path) -> None:
    read = DataReader()
    model = recorded(read, file)
    X, y = read(model["data"]).part("test")
    about = pd.DataFrame({"state": ["used", "used", "accepted"]})
    labelled = Labelled(X[:3].reset_index(drop=True), y[:3].reset_index(drop=True), about)
    rows = rows_for(model, model, read, labelled=labelled)
    assert keys(rows.dataset.part("test")[0]) == keys(X[2:])
    assert "2 that a retraining used as labelled requests" in describe(rows.report)[0]


def test_data_that_changed_or_are_gone_or_not_recorded_need_the_word_of_the_operator(
    file: Path, tmp_path: Path
) -> None:
    champion = recorded(DataReader(), file)
    people(700).to_csv(tmp_path / "new.csv", index=False)
    challenger = recorded(DataReader(), tmp_path / "new.csv")
    nothing: dict[str, Any] = {}
    foreign = {"data": {"_target_": "os.system", "command": "true", "target": "y"}, "dataset_digest": "0"}
    partial = {"data": {"_target_": "project.data.load_digits"}, "dataset_digest": "0"}
    people(600)[:590].to_csv(file, index=False)
    for model, words in (
        (champion, "the data of the champion have changed"), (nothing, "the champion does not record its data"),
        (foreign, "no function of project/"), (partial, "the data of the champion cannot be read"),
    ):  # fmt: skip
        message = refusal(rows_for, model, challenger, DataReader())
        assert words in message and "-P data=..." in message
        rows = rows_for(model, challenger, DataReader(), challenger["data"])
        assert rows.dataset.digest == challenger["dataset_digest"]
        (note,) = rows.report["unknown"]
        # The file as it is now still says which rows the champion was trained on: a row's part depends on the row alone.
        assert words in note and ("are not known" in note) == (model is not champion)
    file.unlink()
    assert "no such file" in refusal(rows_for, champion, challenger, DataReader())
    assert "the data of the challenger have changed" in refusal(
        rows_for, challenger, challenger | {"dataset_digest": "0"}, DataReader()
    )


def test_no_row_that_trained_a_model_judges_it_after_its_file_changed(file: Path) -> None:
    table, read = people(600), DataReader()
    model = recorded(read, file)
    model["column_types"] = dict.fromkeys(read(model["data"]).X, "any")
    before = trained_on(read(model["data"]))
    table.assign(noise=np.arange(600)).to_csv(file, index=False)  # changes the hash of each row
    rows = own_rows(model, DataReader(), None, [])
    assert not keys(rows.dataset.part("test")[0]) & before and describe(rows.report) == []
    successor = recorded(DataReader(), file)
    for rows in (
        own_rows(model, DataReader(), successor["data"], []),
        rows_for(model, successor, DataReader(), successor["data"], min_rows=1),  # as `main` names the file for both
    ):
        assert not keys(rows.dataset.part("test")[0]) & before and rows.report["n"] > 0
    pd.concat([table, people(200, seed=1)]).to_csv(file, index=False)
    for older in (model, {key: value for key, value in model.items() if key != "trained_rows"}):
        rows = own_rows(older, DataReader(), None, [])
        assert not keys(rows.dataset.part("test")[0]) & before and "have changed" in describe(rows.report)[0]
    for other, words in (
        (table.assign(income=table["income"] * 2), "with other values"), (table.drop(columns="city"), "such as city"),
    ):  # fmt: skip
        other.to_csv(file, index=False)
        assert words in refusal(own_rows, model, DataReader(), None, [])
        assert words in refusal(own_rows, model, DataReader(), model["data"], [])
    assert "such as city" in refusal(rows_for, model, recorded(DataReader(), file), DataReader(), model["data"])


def test_rows_that_a_time_or_a_column_moved_to_the_test_part_do_not_judge(file: Path) -> None:
    draw = np.random.default_rng(0)
    table = people(600).assign(part=draw.choice(["train", "val", "test"], 600))
    newer = people(200, seed=1).assign(since=pd.date_range("2024-01-01", periods=200), part="train")
    for by, column in (("time", "since"), ("column", "part")):
        table.to_csv(file, index=False)
        split = SPLIT | {"by": by, "column": column}
        model = recorded(DataReader(), file, split=split)
        before = trained_on(DataReader()(model["data"]))
        pd.concat([table, newer]).to_csv(file, index=False)
        rows = own_rows(model, DataReader(), None, [])
        assert not keys(rows.dataset.part("test")[0]) & before
        table.assign(**{column: draw.permutation(table[column])}).to_csv(file, index=False)
        for data in (None, model["data"]):
            assert "are now test rows" in refusal(own_rows, model, DataReader(), data, [])
        assert "are now test rows" in refusal(rows_for, model, model, DataReader(), model["data"])
        del model["trained_rows"]  # a model of an older version
        assert f"data.split.by={by}" in refusal(own_rows, model, DataReader(), None, [])


def test_rows_that_trained_an_ancestor_do_not_judge(file: Path) -> None:
    read = DataReader()
    first = recorded(read, file)
    second = recorded(read, file, split=SPLIT | {"seed": 1, "test": 0.4}) | {"ancestors_data": [first]}
    before, whole = trained_on(read(first["data"])), read(second["data"])
    assert keys(whole.part("test")[0]) & before
    for rows in (own_rows(second, read, None, []), rows_for(second, second, read)):
        assert not keys(rows.dataset.part("test")[0]) & before and rows.report["n"] >= 30
        assert "that ancestor 1 of " in describe(rows.report)[0] and len(rows.trained_on) == 2
    assert not keys(leave_out_trained(whole, second, read).part("test")[0]) & before
    lost = first | {"data": first["data"] | {"path": f"{file}.csv"}}
    assert "ancestor 1" in describe(own_rows(second | {"ancestors_data": [lost]}, read, None, []).report)[0]
    for forged in (second | {"ancestors_data": [lost]}, {"ancestors_data": [lost, 3]}):
        assert "is not opened" in refusal(check_record, forged, [second["data"]])
    check_record({"ancestors_data": 3}, [])


def test_only_named_data_are_opened(file: Path) -> None:
    own = recorded(DataReader(), file)
    for text in ("/etc/passwd.csv", "http://10.0.0.1/rows.csv", "memory://rows.csv"):
        forged = {"data": own["data"] | {"path": text}}
        assert f"data.path={text}" in refusal(check_record, forged, [own["data"], None])
        check_record(forged, [forged["data"]])
    query = {"data": {"_target_": "project.data.load_sql", "query": "SELECT 1", "target": "y", "limit": 5}}
    assert "data.query=SELECT 1" in refusal(check_record, query, [own["data"]])
    for harmless in (own, {}, {"data": own["data"] | {"path": None, "rotate": 25.0, "drop": ["age"], "task": "auto"}}):
        check_record(harmless, [own["data"]])
