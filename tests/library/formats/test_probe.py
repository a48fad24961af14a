"""Models that would end or block the process that loads them are refused; servers and steps go on."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import skops.io
from forging import CODE, FORGERIES, LABELS, ROWS, change_arrays, code_of
from mlflow.models import Model, infer_signature
from mlflow.pyfunc import PyFuncModel
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from threadpoolctl import threadpool_limits

from alacarte import registry
from alacarte.errors import UserError
from alacarte.formats import load as loading
from alacarte.formats import probe
from alacarte.serving import probe as server_probe
from alacarte.serving.model import ServedModel, rehearse_start


def save(folder: Path, model: Any, rows: Any = ROWS, labels: Any = LABELS) -> Path:
    mlflow.sklearn.save_model(
        model, str(folder), signature=infer_signature(rows, labels), input_example=rows[:5],
        serialization_format="skops", pip_requirements=[],
        skops_trusted_types=skops.io.get_untrusted_types(data=skops.io.dumps(model)),
    )  # fmt: skip
    return folder


def forged(name: str, folder: Path) -> Path:
    model, change = FORGERIES[name]
    save(folder, model.fit(ROWS, LABELS))
    change_arrays(folder / "model.skops", change)
    return folder


def load_unchecked(folder: Path, trust_code: bool) -> tuple[str, Any, PyFuncModel]:
    """As a loader would whose checks miss a forgery."""
    file = folder / "model.skops"
    estimator = skops.io.load(file, trusted=skops.io.get_untrusted_types(file=file))
    model = PyFuncModel(Model.load(str(folder)), estimator, "predict")
    model.input_example = model.metadata.load_input_example(str(folder))
    return "sklearn", estimator, model


def with_code(folder: Path, deed: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir()
    (folder / "forged.py").write_text(code_of(deed))
    monkeypatch.setenv("WHILE_LOGGED", "1")
    mlflow.pyfunc.save_model(
        str(folder / "model"), python_model=str(folder / "forged.py"), pip_requirements=[],
        signature=infer_signature(ROWS, [0.0]), input_example=ROWS[:2],
    )  # fmt: skip
    monkeypatch.delenv("WHILE_LOGGED")
    return folder / "model"


# --- one trial ---


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_ends_or_blocks_the_child_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "load", load_unchecked)
    if "circle" in name:
        monkeypatch.setattr(probe, "SECONDS", 1)
    folder = forged(name, tmp_path / "model")
    before = psutil.Process().children(recursive=True)  # servers that other tests of this session share
    with pytest.raises(UserError) as refused:
        probe.load_safely(folder)
    end = "did not answer within 2 s" if "circle" in name else "ended with SIGSEGV"
    assert str(refused.value) == f"{folder}: the process that tried it {end}"
    assert set(psutil.Process().children(recursive=True)) <= set(before)


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        (CODE["crash"], "the process that tried it ended with SIGSEGV"),
        (CODE["loop"], "the process that tried it did not answer within 2 s"),
        (CODE["memory"], "the process that tried it needed more than 301 MB"),
        ("os._exit(0)", "the process that tried it ended with exit code 0"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
    ],
)
def test_own_code_ends_or_blocks_the_child_alone(deed: str, reason: str, tmp_path: Path, monkeypatch):
    if deed == CODE["loop"]:
        monkeypatch.setattr(probe, "SECONDS", 1)
    monkeypatch.setattr(probe, "MEGABYTES", 300)
    folder = with_code(tmp_path / "code", deed, monkeypatch)
    with pytest.raises(UserError) as refused:
        probe.check(folder, trust_code=True)
    assert str(refused.value) == f"{folder}: {reason}"


def test_an_exception_for_some_rows_refuses_no_model(tmp_path: Path, monkeypatch):
    folder = with_code(tmp_path / "code", "raise ValueError('these rows are not mine')", monkeypatch)
    assert probe.load_safely(folder, trust_code=True)[0] == "code"


def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason_of_the_loader(tmp_path: Path):
    folder = save(tmp_path / "model", FORGERIES["neighbours far away"][0].fit(ROWS, LABELS))
    (folder / "model.skops").write_bytes(b"PK\x03\x04 no longer a model")
    with pytest.raises(UserError, match="not a skops file") as refused:
        probe.check(folder)
    assert str(refused.value).count(str(folder)) <= 2 and "\n" not in str(refused.value)


@pytest.mark.parametrize("estimator", [HistGradientBoostingClassifier(max_iter=3), RandomForestClassifier(5, n_jobs=2)])
def test_a_child_predicts_after_its_parent_has_used_threads(estimator: Any, tmp_path: Path, monkeypatch):
    """OpenMP and OpenBLAS keep threads, which a fork does not copy."""
    monkeypatch.setattr(probe, "SECONDS", 20)
    folder = save(tmp_path / "model", estimator.fit(ROWS, LABELS))
    big = pd.concat([ROWS] * 500, ignore_index=True)
    with threadpool_limits(2):
        for _ in range(2):
            _, loaded, model = probe.load_safely(folder)
            assert len(loaded.predict(big)) == len(model.predict(big)) == len(big)
            np.linalg.svd(np.random.default_rng(0).normal(size=(300, 300)))


def test_the_rows_are_usual_and_unusual():
    example = pd.DataFrame({"n": [1.0, 2.0], "i": np.array([3, 4], "int32"), "t": ["x", "y"], "b": [True, False]})
    tables = list(probe.trial_tables(example, np.random.default_rng(0)))
    assert all((table.dtypes == example.dtypes).all() and len(table) == probe.ROWS for table in tables)
    numbers = np.concatenate([table["n"] for table in tables])
    assert np.isnan(numbers).any() and (numbers == 0).any() and (np.abs(numbers) > 1e299).any()
    assert ((numbers > 1) & (numbers < 2)).any()
    assert {np.iinfo("int32").min, np.iinfo("int32").max} <= set(np.concatenate([table["i"] for table in tables]))
    assert set(np.concatenate([table["t"] for table in tables])) == {"x", "y", probe.UNSEEN}
    arrays = list(probe.trial_tables(np.array([[0.5, 1.0]], "float32"), np.random.default_rng(0)))
    assert {table.shape for table in arrays} == {(probe.ROWS, 2)} and np.isinf(arrays[-1]).any()
    assert list(probe.trial_tables({"a": 1}, np.random.default_rng(0))) == []


# --- what a server does with a model before it serves, on rows that the trial does not have ---


def with_large_answers(folder: Path) -> Path:
    """Logged answers of ten lines of YAML that name each other: ten thousand million numbers, if anybody reads them."""
    save(folder, LogisticRegression().fit(ROWS, LABELS))
    lines = ["metadata:", "  a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    lines.append("  example_predictions: [*a9, *a9, *a9, *a9, *a9]\n")
    with (folder / "MLmodel").open("a") as file:
        file.write("\n".join(lines))
    return folder


def with_wide_rows(folder: Path) -> Path:
    """A signature that says that a row has 2**40 numbers, of which the server would make names."""
    rows = ROWS.to_numpy()
    save(folder, LogisticRegression().fit(rows, LABELS), rows)
    text = (folder / "MLmodel").read_text()
    assert "[-1, 2]" in text
    (folder / "MLmodel").write_text(text.replace("[-1, 2]", f"[-1, {2**40}]"))
    return folder


@pytest.mark.parametrize(
    ("make", "reason"),
    [(with_large_answers, "needed more than 301 MB|did not answer"), (with_wide_rows, "needed more than 301 MB")],
)
def test_the_start_is_rehearsed_in_the_child(make: Callable[[Path], Path], reason: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 5)
    monkeypatch.setattr(probe, "MEGABYTES", 300)
    monkeypatch.setattr(loading, "read_description", lambda folder: Model.load(str(folder)))
    folder = make(tmp_path / "model")
    probe.check(folder)
    with pytest.raises(UserError, match=reason):
        ServedModel.load_tried(folder, trust_code=False)


@pytest.mark.parametrize("metadata", ["[" * 10**5, "&a {again: *a}", "[1, 2]"])
def test_a_description_that_cannot_be_read_is_a_user_error(metadata: str, tmp_path: Path):
    folder = save(tmp_path / "model", LogisticRegression().fit(ROWS, LABELS))
    with (folder / "MLmodel").open("a") as file:
        file.write(f"metadata: {metadata}\n")
    with pytest.raises(UserError, match=r"more than|no model that can be read"):
        registry.locate(str(folder))


MERGED = "".join(f", &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 6))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (f"[&a0 {{k: 1}}{MERGED}]", r"merge keys of YAML \(<<\) are not read"),
        ("{!!merge a: {b: 1}}", r"merge keys of YAML \(<<\) are not read"),
        ("1" + ":0" * 200_000, "a whole number of more than 20 digits"),
        (
            "{" + ", ".join(f"{i * (2**61 - 1)}: 1" for i in range(20_000)) + "}",
            "a whole number of more than 20 digits",
        ),
        ("[" + "1, " * 100_000 + "]", "more than 100000 values"),
    ],
    ids=["merge", "tag", "base 60", "one hash", "values"],
)
def test_a_description_that_takes_hours_to_read_is_refused(metadata: str, reason: str, tmp_path: Path):
    """In the process that asks, because it reads MLmodel before the trial."""
    folder = save(tmp_path / "model", LogisticRegression().fit(ROWS, LABELS))
    with (folder / "MLmodel").open("a") as file:
        file.write(f"metadata: {metadata}\n")
    started = time.monotonic()
    for read in (registry.locate, ServedModel.load_tried):
        with pytest.raises(UserError, match=reason) as refused:
            read(*([str(folder)] if read is registry.locate else [folder, False]))
        assert "\n" not in str(refused.value)
    assert time.monotonic() - started < 60


def test_a_short_description_of_endless_values_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="MLmodel has more than 1000000 values"):
        probe.check(with_large_answers(tmp_path / "model"))


def test_the_search_for_a_fast_path_is_rehearsed_in_the_child(tmp_path: Path, monkeypatch):
    """A pattern of a text model that needs for ever for a text of the parity check, while no other thread can run."""
    rows = pd.DataFrame({"text": ["red one", "blue two"] * 20})
    words = CountVectorizer()
    model = make_pipeline(ColumnTransformer([("words", words, "text")]), LogisticRegression()).fit(rows, [0, 1] * 20)
    model[0].named_transformers_["words"].token_pattern = r"(?:x+x+)+y|\w+"
    served = ServedModel.load_tried(save(tmp_path / "model", model, rows, [0]), trust_code=False)
    monkeypatch.setattr(probe, "SECONDS", 1)
    with pytest.raises(UserError, match="did not answer within 2 s"):
        served.find_fast_path()
    assert served.path_in_use == "pyfunc" and served.predict_example() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("degree", [3, 4])
def test_a_model_whose_rows_need_much_memory_is_refused(degree: int, tmp_path: Path, monkeypatch):
    """A pipeline that makes 12,341 or 135,751 numbers of a row: 512 rows have room in the child, or they have not."""
    monkeypatch.setattr(probe, "MEGABYTES", 300)
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 40))).add_prefix("x")
    model = make_pipeline(PolynomialFeatures(degree), DummyClassifier()).fit(rows, [0, 1] * 10)
    folder = save(tmp_path / "model", model, rows, [0])
    with pytest.raises(UserError, match=r"serve\.max_rows=10000 rows needs more than 301 MB") as refused:
        ServedModel.load_tried(folder, trust_code=False, max_rows=10_000)
    fitting = int(str(refused.value).rpartition("=")[2])
    assert 64 < fitting < 10_000 and "\n" not in str(refused.value)
    ServedModel.load_tried(folder, trust_code=False, max_rows=fitting)


# --- the process of a server that forks the trials ---


def test_a_version_that_hangs_does_not_delay_the_next(tmp_path: Path, monkeypatch):
    good = save(tmp_path / "good", HistGradientBoostingClassifier(max_iter=2).fit(ROWS, LABELS))
    loop = with_code(tmp_path / "code", CODE["loop"], monkeypatch)
    crash = with_code(tmp_path / "crash", CODE["crash"], monkeypatch)
    before = set(psutil.Process().children())
    monkeypatch.setattr(probe, "SECONDS", 10)
    monkeypatch.setattr(server_probe, "_control", None)
    server_probe.start(trust_code=True)
    (process,) = set(psutil.Process().children()) - before
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(server_probe.check, loop, True, rehearse_start)
        for _ in range(2):
            with pytest.raises(UserError, match="ended with SIGSEGV"):
                server_probe.check(crash, True, rehearse_start)
            server_probe.check(good, False, rehearse_start)
        assert not hanging.done()
        process.kill()
        with pytest.raises(UserError, match="did not answer"):
            hanging.result()
    with pytest.raises(UserError, match="has ended; restart the server"):
        server_probe.check(good, False, rehearse_start)
