"""score: rows of a file answered by a version of the registry, written whole, with their lineage; mistakes in one line."""

import csv
import datetime
import decimal
import hashlib
import os
from pathlib import Path

import fsspec
import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Project, tracking
from people import people, refusal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import FixedThresholdClassifier
from sklearn.svm import LinearSVC

from alacarte import registry, scoring
from alacarte.errors import UserError
from alacarte.learners.sklearn import SklearnLearner


@pytest.fixture(scope="module")
def scored(project: Project) -> Project:
    """A project with a model of people as version 1, the champion, and as version 2, the challenger."""
    learned = people()
    learned["y"] = np.where(learned["income"] > 50, "yes", "no")
    learned.to_csv(project.root / "people.csv", index=False)
    table = ("data=table", "data.path=people.csv", "data.target=y", "registered_model_name=people")
    project.step("pipeline", *table, "model=sklearn_sgd")
    with tracking(project.uri):
        project.client.create_model_version("people", project.client.get_model_version("people", "1").source)
    project.client.set_registered_model_alias("people", "challenger", "2")
    rows = people(40, seed=9).drop(columns="y")
    rows.loc[3, "city"] = None
    rows.loc[4, "city"] = "Atlantis"
    rows.assign(id=np.arange(40)).to_csv(project.root / "rows.csv", index=False)
    rows.assign(id=np.arange(40)).to_parquet(project.root / "rows.parquet", index=False)
    return project


def score(project: Project, *arguments: str, code: int = 0):
    return project.step("score", "registered_model_name=people", *arguments, code=code)


def test_the_champion_answers_and_the_rows_say_who_did(scored: Project):
    run_id = score(scored, "input=rows.csv", "output=answers.csv").stdout.splitlines()[-1].removeprefix("run_id=")
    champion = str(scored.client.get_model_version_by_alias("people", "champion").version)
    rows = pd.read_csv(scored.root / "rows.csv", parse_dates=["since"])
    answers = pd.read_csv(scored.root / "answers.csv")
    assert set(answers["model_version"].astype(str)) == {champion} and set(answers["run_id"]) == {run_id}
    with tracking(scored.uri):
        stock = mlflow.pyfunc.load_model(f"models:/people/{champion}").predict(rows.drop(columns="id"))
    assert answers["prediction"].tolist() == list(stock)
    assert answers["confidence"].between(0.5, 1).all()

    run = scored.client.get_run(run_id)
    version = scored.client.get_model_version("people", champion)
    digest = hashlib.sha256((scored.root / "rows.csv").read_bytes()).hexdigest()
    assert run.info.status == "FINISHED" and run.data.metrics["rows"] == 40
    assert run.data.tags["source_run_id"] == version.run_id and run.data.tags["model_version"] == champion
    assert run.data.tags["input_digest"] == digest
    assert run.data.tags["output_digest"] == hashlib.sha256((scored.root / "answers.csv").read_bytes()).hexdigest()
    assert run.inputs.dataset_inputs[0].dataset.digest == digest[:16]
    assert [each.model_id for each in run.inputs.model_inputs] == [version.source.removeprefix("models:/")]


def test_a_version_by_its_number_from_parquet_to_parquet_through_mlflow_run(scored: Project):
    parameters = ("model_uri=models:/people/2", "input=rows.parquet", "output=two words.parquet")
    command = ("mlflow", "run", ".", "-e", "score", "--env-manager", "local")
    (scored.root / "two words.parquet").write_text("what was there is replaced")
    scored.run(*command, *[part for each in parameters for part in ("-P", each)])
    answers = pd.read_parquet(scored.root / "two words.parquet")
    assert len(answers) == 40 and answers["prediction"].notna().all() and set(answers["model_version"]) == {"2"}
    assert not list(scored.root.glob(".score-*"))


def test_a_mistake_is_one_line_and_a_failed_run(scored: Project):
    pd.read_csv(scored.root / "rows.csv").assign(income="much").to_csv(scored.root / "text.csv", index=False)
    stderr = score(scored, "input=text.csv", "output=x.csv", code=2).stderr
    line = "score: input=text.csv: column 'income' holds 'much', but the model needs numbers: correct 40 of 40 rows"
    assert line in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert not list(scored.root.glob("x.*")) and not list(scored.root.glob(".score-*"))
    assert not scored.runs("attributes.status = 'RUNNING'") and scored.runs("attributes.status = 'FAILED'")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("rows.csv", "rows.csv is the input"),
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
    assert line in refusal(scoring.check_output, str(tmp_path / "rows.csv"), output)
    assert "name a file that ends in .csv" in refusal(scoring.check_output, "rows.csv", "x.parquet", True)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "rows.csv: no such file"),
        ("a,b\n", "2 columns and 0 rows"),
        ("a;b\n1;2\n", "use \"separator=';'\""),
        ("a,a\n1,2\n", "more than once"),
    ],
)
def test_an_input_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None, line: str):
    if content:
        (tmp_path / "rows.csv").write_text(content)
    message = refusal(scoring.open_input, str(tmp_path / "rows.csv"), None)
    assert line in message and "data." not in message


# Cells that a CSV reader would change, and a column with the name of an answer.
CELLS = ["", "zip", "order", "country", "price", "ok", "age", "prediction", "income", "member", "city", "since"]
ROWS = [
    ["7", "00501", "9007199254740993", "NA", "1.10", "true", "40", "x", "44.10", "True", "Bern", "2020-01-01"],
    ["8", "", " 1e5", "", "NULL", "", "NA", "", "", "", "NA", ""],
]


def test_the_output_keeps_every_cell_of_a_csv_as_it_is_written(scored: Project):
    with (scored.root / "cells.csv").open("w", newline="") as file:
        csv.writer(file).writerows([CELLS, *ROWS])
    for output in ("cells out.csv", "cells out.parquet"):
        score(scored, "input=cells.csv", f"output={output}")
    with (scored.root / "cells out.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == [*CELLS, "prediction_2", "confidence", "model_version", "run_id"]
    assert [row[:12] for row in rows] == ROWS and {row[12] for row in rows} <= {"yes", "no"}
    frame = pd.read_parquet(scored.root / "cells out.parquet")
    assert frame.iloc[:, :12].to_numpy().tolist() == ROWS, "a CSV has no types, so the columns are text"
    assert frame["prediction_2"].tolist() == [row[12] for row in rows]


def test_the_output_keeps_every_type_of_a_parquet_file(scored: Project):
    day = datetime.datetime(2020, 1, 1, 12, tzinfo=datetime.UTC)
    columns: dict[str, pa.Array] = {
        "order": pa.array([2**53 + 1, None], pa.int64()), "zip": pa.array(["00501", None]).dictionary_encode(),
        "price": pa.array([decimal.Decimal("1.10"), None]), "day": pa.array([day.date(), None]),
        "at": pa.array([day, None], pa.timestamp("us", "Asia/Tokyo")), "parts": pa.array([[1], None]),
        "age": pa.array([40, None], pa.int8()), "income": pa.array([44.1, None], pa.float32()), "member": [True, None],
        "city": pa.array(["NA", None], pa.large_string()), "since": ["2020-01-01", None],
    }  # fmt: skip
    table = pa.table(columns)
    pq.write_table(table, scored.root / "types.parquet")
    score(scored, "input=types.parquet", "output=types out.parquet")
    output = pq.read_table(scored.root / "types out.parquet").replace_schema_metadata(None)
    assert output.select(table.column_names).equals(table) and output.column_names[-4] == "prediction"
    score(scored, "input=types.parquet", "output=types out.csv")
    first = (scored.root / "types out.csv").read_text().splitlines()[1]
    assert first.startswith("9007199254740993,00501,1.10,2020-01-01,")


def test_a_column_that_is_missing_is_named(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("incomes\n1.0\n")
    table, _, _ = scoring.open_input(str(tmp_path / "rows.csv"), None)
    message = refusal(scoring.read_inputs, table, {"column_types": {"income": "double"}})
    assert "no column 'income', which the model takes: did you mean 'incomes'" in message


def test_a_file_is_read_as_the_data_of_the_training_were(tmp_path: Path):
    """Codes stay text in any file, and the words for missing values that the model records count in it, too."""
    types = {"code": "string", "country": "string", "n": "double", "y": "string"}
    for missing, country in ((None, "NA"), (["NA"], None)):
        metadata = {"data": {"missing": missing}, "column_types": types, "target": "y"}
        for more in ("", "A1,?,\n"):
            (tmp_path / "rows.csv").write_text(f"code,country,n\n007,NA,1\n012,DE,2\n{more}")
            table, _, _ = scoring.open_input(str(tmp_path / "rows.csv"), None)
            rows = scoring.read_inputs(table, metadata).head(2).astype(object)
            expected = [["007", country, 1.0], ["012", "DE", 2.0]]
            assert rows.where(rows.notna(), None).to_numpy().tolist() == expected


def test_an_alias_is_read_once_and_a_version_that_is_not_there_is_named(scored: Project):
    with tracking(scored.uri):
        assert registry.pin(None, "people") == ("models:/people/1", "1")
        assert registry.pin("models:/people@challenger", None) == ("models:/people/2", "2")
        assert registry.pin("models:/people/2", None) == ("models:/people/2", "2")
        assert registry.pin("models:/m-1", None) == ("models:/m-1", "none")
        for uri, name, line in (
            ("models:/people@best", None, "no version with alias best: give 1, 2"),
            (None, None, "model_uri=null and registered_model_name=null"),
            (None, "nobody", "nobody has no version with alias champion: give another registered_model_name"),
        ):
            assert line in refusal(registry.pin, uri, name)


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
    frame = pd.DataFrame({"a": [1, 2]})
    scoring.check_output("rows.csv", "memory://there/answers.csv")
    scoring.write_output(frame, "memory://there/answers.csv")
    with fsspec.open("memory://there/answers.csv") as file:
        pd.testing.assert_frame_equal(pd.read_csv(file), frame)


FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1+1", "\r=1+1", "\n=1+1", "\uff1d1+1"]


def test_text_that_a_spreadsheet_would_run_is_made_safe_on_request(tmp_path: Path, scored: Project):
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
    lines = (tmp_path / "safe.csv").read_text().splitlines()
    assert "=1+1" not in [cell for row in csv.reader(lines, delimiter=";") for cell in row]
    pd.read_csv(scored.root / "rows.csv").assign(note="=1+1").to_csv(scored.root / "formulas.csv", index=False)
    score(scored, "input=formulas.csv", "output=safe.csv", "spreadsheet_safe=true")
    assert set(pd.read_csv(scored.root / "safe.csv")["note"]) == {"'=1+1"}


def test_confidence_belongs_to_the_prediction_also_behind_a_threshold():
    rows = pd.DataFrame({"x": np.arange(40.0)})
    model = FixedThresholdClassifier(LogisticRegression(), threshold=0.1, response_method="predict_proba")
    learner = SklearnLearner.of(model.fit(rows, np.where(rows["x"] > 19, "yes", "no")))
    answers = scoring.answer(learner, rows, "rows.csv", probabilities=True)
    of_class = {"no": answers["probability_no"], "yes": answers["probability_yes"]}
    assert ((answers["prediction"] == "yes") & (answers["probability_yes"] < 0.5)).any()
    assert all(row.confidence == of_class[row.prediction][i] for i, row in enumerate(answers.itertuples()))
    with pytest.raises(UserError, match="probabilities=true: this model gives no probabilities"):
        scoring.answer(SklearnLearner.of(LinearSVC().fit(rows, rows["x"] > 19)), rows, "rows.csv", probabilities=True)
