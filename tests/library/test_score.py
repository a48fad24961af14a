"""score: rows of a file answered by a version of the registry, written whole, with their lineage; mistakes in one line."""

import csv
import hashlib
import os
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pytest
from conftest import Project
from people import people

from alacarte import registry, scoring
from alacarte.errors import UserError
from alacarte.learners import Learner


@pytest.fixture(scope="module")
def scored(project: Project) -> Project:
    """A project with two versions of a model of people; the first is champion."""
    learned = people()
    learned["y"] = np.where(learned["income"] > 50, "yes", "no")
    learned.to_csv(project.root / "people.csv", index=False)
    table = ("data=table", "data.path=people.csv", "data.target=y", "registered_model_name=people")
    project.step("pipeline", *table, "model=sklearn_sgd")
    project.step("pipeline", *table, "model=sklearn_hgb", "model.max_iter=5")
    rows = people(40, seed=9).drop(columns="y")
    rows.loc[3, "city"] = None
    rows.loc[4, "city"] = "Atlantis"
    rows.assign(id=np.arange(40)).to_csv(project.root / "rows.csv", index=False)
    rows.assign(id=np.arange(40)).to_parquet(project.root / "rows.parquet", index=False)
    return project


def score(project: Project, *arguments: str, code: int = 0):
    return project.step("score", "registered_model_name=people", *arguments, code=code)


def test_the_champion_answers_and_the_rows_say_who_did(scored: Project):
    import mlflow

    run_id = score(scored, "input=rows.csv", "output=answers.csv").stdout.splitlines()[-1].removeprefix("run_id=")
    champion = str(scored.client.get_model_version_by_alias("people", "champion").version)
    rows, answers = pd.read_csv(scored.root / "rows.csv"), pd.read_csv(scored.root / "answers.csv")
    pd.testing.assert_frame_equal(answers[rows.columns], rows)
    assert set(answers["model_version"].astype(str)) == {champion} and set(answers["run_id"]) == {run_id}
    mlflow.set_tracking_uri(scored.uri)
    stock = mlflow.pyfunc.load_model(f"models:/people/{champion}").predict(rows.drop(columns="id"))
    assert answers["prediction"].tolist() == list(stock)
    assert answers["confidence"].between(0.5, 1).all()

    run = scored.client.get_run(run_id)
    version = scored.client.get_model_version("people", champion)
    content = (scored.root / "rows.csv").read_bytes()
    assert run.info.status == "FINISHED" and run.data.metrics["rows"] == 40
    assert run.data.tags["source_run_id"] == version.run_id and run.data.tags["model_version"] == champion
    assert run.data.tags["input_digest"] == hashlib.sha256(content).hexdigest()
    written = (scored.root / "answers.csv").read_bytes()
    assert run.data.tags["output_digest"] == hashlib.sha256(written).hexdigest()
    assert run.inputs.dataset_inputs[0].dataset.digest == hashlib.sha256(content).hexdigest()[:16]
    assert [one.model_id for one in run.inputs.model_inputs] == [version.source.removeprefix("models:/")]


def test_a_version_by_its_number_from_parquet_to_parquet_through_mlflow_run(scored: Project):
    parameters = ("model_uri=models:/people/2", "input=rows.parquet", "output=two words.parquet")
    command = ("mlflow", "run", ".", "-e", "score", "--env-manager", "local")
    (scored.root / "two words.parquet").write_text("what was there is replaced")
    scored.run(*command, *[part for one in parameters for part in ("-P", one)])
    answers = pd.read_parquet(scored.root / "two words.parquet")
    assert len(answers) == 40 and answers["prediction"].notna().all() and set(answers["model_version"]) == {"2"}
    assert not list(scored.root.glob(".score-*"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("input=rows.csv", "output=./rows.csv"), "score: output=./rows.csv is the input"),
        (
            ("input=text.csv", "output=x.csv"),
            "score: input=text.csv: column 'income' holds 'much', but the model needs numbers",
        ),
        (("output=x.csv",), "score: input is required"),
    ],
)
def test_a_mistake_is_one_line_and_a_failed_run(scored: Project, arguments: tuple[str, ...], line: str):
    pd.read_csv(scored.root / "rows.csv").assign(income="much").to_csv(scored.root / "text.csv", index=False)
    before = (scored.root / "rows.csv").read_bytes()
    done = score(scored, *arguments, code=2)
    assert line in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert (scored.root / "rows.csv").read_bytes() == before
    assert not (scored.root / "x.csv").exists() and not list(scored.root.glob(".score-*"))
    assert not scored.runs("attributes.status = 'RUNNING'")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("rows.csv", "output=.*rows.csv is the input"),
        ("linked.csv", "is the input"),
        ("x.json", "must end in .csv, .parquet, .pq"),
        ("none/x.csv", "is no folder that can be written"),
        ("folder.csv", "is a folder: name a file in it"),
        ("nofs://x/y.csv", "cannot be reached"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path, output: str, line: str):
    (tmp_path / "rows.csv").write_text("a\n1\n")
    (tmp_path / "folder.csv").mkdir()
    os.link(tmp_path / "rows.csv", tmp_path / "linked.csv")
    output = output if "://" in output else str(tmp_path / output)
    with pytest.raises(UserError, match=line):
        scoring.check_output(str(tmp_path / "rows.csv"), output)


@pytest.mark.parametrize(
    ("content", "separator", "line"),
    [
        (None, None, "input=.*rows.csv: no such file"),
        ("a,b\n", None, "2 columns and 0 rows"),
        ("a;b\n1;2\n", None, "set separator=';'"),
        ("a,a\n1,2\n", None, "more than once"),
    ],
)
def test_an_input_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None, separator: str | None, line: str):
    if content:
        (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(UserError, match=line) as caught:
        scoring.read_input(str(tmp_path / "rows.csv"), separator)
    assert "data." not in str(caught.value)


def test_columns_that_are_missing_or_taken_are_named():
    frame = pd.DataFrame({"incomes": [1.0], "prediction": [1]})
    learner = cast(Learner, None)  # it is not asked
    with pytest.raises(UserError, match="no column 'income', which the model takes: did you mean 'incomes'"):
        scoring.answer(learner, ["income"], frame, "rows.csv")
    with pytest.raises(UserError, match="has a column 'prediction'"):
        scoring.beside(frame, frame, "rows.csv")


def test_an_alias_is_read_once_and_a_version_that_is_not_there_is_named(scored: Project):
    import mlflow

    mlflow.set_tracking_uri(scored.uri)
    try:
        assert registry.pin(None, "people") == ("models:/people/1", "1")
        assert registry.pin("models:/people@challenger", None) == ("models:/people/2", "2")
        assert registry.pin("models:/people/2", None) == ("models:/people/2", "2")
        assert registry.pin("models:/m-1", None) == ("models:/m-1", "none")
        for uri, name, line in (
            ("models:/people@best", None, "no version with alias best: give 1, 2"),
            (None, None, "model_uri=null and registered_model_name=null"),
            (None, "nobody", "nobody has no version with alias champion: give another registered_model_name"),
        ):
            with pytest.raises(UserError, match=line):
                registry.pin(uri, name)
    finally:
        mlflow.set_tracking_uri(None)


def test_what_was_there_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "answers.csv"
    output.write_text("before")

    def full(self: pd.DataFrame, file, **_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(UserError, match="No space left"):
        scoring.write_output(pd.DataFrame({"a": [1]}), str(output))
    assert output.read_text() == "before" and list(tmp_path.iterdir()) == [output]


def test_a_url_is_written_through_its_file_system():
    import fsspec

    frame = pd.DataFrame({"a": [1, 2]})
    scoring.check_output("rows.csv", "memory://there/answers.csv")
    scoring.write_output(frame, "memory://there/answers.csv")
    with fsspec.open("memory://there/answers.csv") as file:
        pd.testing.assert_frame_equal(pd.read_csv(file), frame)


FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1+1", "\r=1+1", "\n=1+1", "\uff1d1+1"]


def test_text_that_a_spreadsheet_would_run_is_made_safe_on_request(tmp_path: Path):
    harmless = ["a;=1+1", "-1.5", "+3e-2", "x=1", "", 'a "b", c', "é"]
    texts = [*FORMULAS, *harmless]
    frame = pd.DataFrame({"text": texts, "=name": np.arange(len(texts)) - 4.5, "kind": pd.Categorical(texts)})
    frame["mixed"] = [None, -7, *texts[2:]]
    scoring.write_output(frame, str(tmp_path / "as is.csv"))
    scoring.write_output(frame, str(tmp_path / "safe.csv"), spreadsheet_safe=True)
    with (tmp_path / "as is.csv").open(newline="", encoding="utf-8") as file:
        unchanged = list(csv.reader(file))
    with (tmp_path / "safe.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert unchanged[0] == ["text", "=name", "kind", "mixed"] and [row[0] for row in unchanged[1:]] == texts
    assert header == ["text", "'=name", "kind", "mixed"]
    expected = [f"'{text}" for text in FORMULAS] + harmless
    assert [row[0] for row in rows] == [row[2] for row in rows] == expected
    assert [row[3] for row in rows] == ["", "-7", *expected[2:]]
    assert pd.read_csv(tmp_path / "safe.csv")["'=name"].tolist() == frame["=name"].tolist(), "numbers stay numbers"
    # A spreadsheet may separate by semicolons and knows quotes only where a cell begins.
    cells = [
        cell for row in csv.reader((tmp_path / "safe.csv").read_text().splitlines(), delimiter=";") for cell in row
    ]
    assert '"a;=1+1"' in (tmp_path / "safe.csv").read_text() and "=1+1" not in cells


def test_a_safe_csv_is_a_parameter_of_the_step(scored: Project):
    rows = pd.read_csv(scored.root / "rows.csv").assign(note="=1+1")
    rows.to_csv(scored.root / "formulas.csv", index=False)
    score(scored, "input=formulas.csv", "output=safe.csv", "spreadsheet_safe=true")
    assert set(pd.read_csv(scored.root / "safe.csv")["note"]) == {"'=1+1"}
    score(scored, "input=formulas.csv", "output=plain.csv")
    assert set(pd.read_csv(scored.root / "plain.csv")["note"]) == {"=1+1"}
    refused = score(scored, "input=formulas.csv", "output=safe.parquet", "spreadsheet_safe=true", code=2)
    assert "name a file that ends in .csv" in refused.stderr
