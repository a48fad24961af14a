"""Models that would end or block the process that loads them are refused; servers and steps go on."""

import inspect
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import skops.io
from conftest import Project, copy_project, tracking
from forging import CODE, FORGERIES, LABELS, ROWS, change_arrays, code_of
from mlflow import MlflowClient
from mlflow.models import Model, infer_signature
from mlflow.pyfunc import PyFuncModel
from registries import until
from servers import ROWS as REQUEST
from servers import Served, register_constant, serving
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from alacarte import registry
from alacarte.errors import UserError
from alacarte.formats import load as loading
from alacarte.formats import probe
from alacarte.serving.model import ServedModel, rehearse_start
from alacarte.serving.probe import PROCESSES, WarmProcess, warm_processes
from alacarte.serving.probe import check as check_in_warm_process

NAME = "probed"


def save(folder: Path, model: Any, example: Any = ROWS[:5]) -> Path:
    mlflow.sklearn.save_model(
        model, str(folder), signature=infer_signature(ROWS, LABELS), input_example=example,
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
    monkeypatch.setattr(probe, "SECONDS", 5)
    folder = forged(name, tmp_path / "model")
    with pytest.raises(UserError) as refused:
        probe.load_safely(folder)
    end = "did not answer within 6 s" if "circle" in name else "ended with SIGSEGV"
    assert str(refused.value) == f"{folder}: the process that tried it {end}"
    assert not psutil.Process().children(recursive=True)


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        (CODE["crash"], "the process that tried it ended with SIGSEGV"),
        (CODE["loop"], "the process that tried it did not answer within 6 s"),
        (CODE["memory"], "the process that tried it needed more than 301 MB"),
        ("os._exit(0)", "the process that tried it ended with exit code 0"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
    ],
)
def test_own_code_ends_or_blocks_the_child_alone(deed: str, reason: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 5)
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
    for _ in range(2):
        _, loaded, model = probe.load_safely(folder)
        assert len(loaded.predict(big)) == len(model.predict(big)) == len(big)
        np.linalg.svd(np.random.default_rng(0).normal(size=(300, 300)))


def test_the_rows_are_usual_and_unusual(tmp_path: Path):
    example = pd.DataFrame({"n": [1.0, 2.0], "i": np.array([3, 4], "int32"), "t": ["x", "y"], "b": [True, False]})
    tables = [table for tables in probe.trial_tables(example, np.random.default_rng(0)) for table in tables]
    assert all((table.dtypes == example.dtypes).all() and len(table) == probe.ROWS for table in tables)
    numbers = np.concatenate([table["n"] for table in tables])
    assert np.isnan(numbers).any() and (numbers == 0).any() and (np.abs(numbers) > 1e299).any()
    assert ((numbers > 1) & (numbers < 2)).any()
    assert {np.iinfo("int32").min, np.iinfo("int32").max} <= set(np.concatenate([table["i"] for table in tables]))
    assert set(np.concatenate([table["t"] for table in tables])) == {"x", "y", probe.UNSEEN}
    [usual, huge] = probe.trial_tables(np.array([[0.5, 1.0]], "float32"), np.random.default_rng(0))
    assert {table.shape for table in [*usual, *huge]} == {(probe.ROWS, 2)} and np.isinf(huge[0]).any()
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
    mlflow.sklearn.save_model(
        LogisticRegression().fit(rows, LABELS), str(folder), signature=infer_signature(rows, LABELS), input_example=rows,
        serialization_format="skops", pip_requirements=[],
    )  # fmt: skip
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


def test_a_short_description_of_endless_values_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="MLmodel has more than 1000000 values"):
        probe.check(with_large_answers(tmp_path / "model"))


def test_the_search_for_a_fast_path_is_rehearsed_in_the_child(tmp_path: Path, monkeypatch):
    """A pattern of a text model that needs for ever for a text of the parity check, while no other thread can run."""
    monkeypatch.setattr(probe, "SECONDS", 5)
    rows = pd.DataFrame({"text": ["red one", "blue two"] * 20})
    words = CountVectorizer()
    model = make_pipeline(ColumnTransformer([("words", words, "text")]), LogisticRegression()).fit(rows, [0, 1] * 20)
    model[0].named_transformers_["words"].token_pattern = r"(?:x+x+)+y|\w+"
    mlflow.sklearn.save_model(
        model, str(tmp_path / "model"), signature=infer_signature(rows, [0]), input_example=rows[:2],
        serialization_format="skops", pip_requirements=[],
    )  # fmt: skip
    served = ServedModel.load_tried(tmp_path / "model", trust_code=False)
    with pytest.raises(UserError, match="did not answer within 6 s"):
        served.find_fast_path()
    assert served.path_in_use == "pyfunc" and served.predict_example() == [0, 1]


# --- the warm process of a server ---


def test_the_warm_process_is_started_again_when_it_ends(tmp_path: Path, monkeypatch):
    good = save(tmp_path / "good", HistGradientBoostingClassifier(max_iter=2).fit(ROWS, LABELS))
    crash = with_code(tmp_path / "code", CODE["crash"], monkeypatch)
    warm = WarmProcess()
    try:
        for _ in range(2):
            warm.check(good, False)
            with pytest.raises(UserError, match="ended with SIGSEGV"):
                warm.check(crash, True)
            ended = psutil.Process(warm._process.pid)
            ended.kill()
            until(lambda ended=ended: ended.status() == "zombie")
    finally:
        warm.stop()
    with pytest.raises(UserError, match="the server stops"):
        warm.check(good, False)


def test_a_version_that_hangs_does_not_delay_the_next(tmp_path: Path, monkeypatch):
    good = save(tmp_path / "good", HistGradientBoostingClassifier(max_iter=2).fit(ROWS, LABELS))
    loop = with_code(tmp_path / "code", CODE["loop"], monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        with warm_processes(trust_code=True):
            hanging = pool.submit(check_in_warm_process, loop, True, rehearse_start)
            check_in_warm_process(good, False, rehearse_start)
            assert not hanging.done()
        with pytest.raises(UserError, match="the server stops"):
            hanging.result()


# --- a server ---


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy in which a trial takes 5 seconds and 300 MB at most, and versions 1 good, 2 crash, 3 loop, 4 memory, 5 good."""
    root = copy_project(tmp_path_factory.mktemp("project"))
    file = root / "alacarte/formats/probe.py"
    text = file.read_text().replace("\nSECONDS = 60\n", "\nSECONDS = 5\n")
    file.write_text(text.replace("\nMEGABYTES = 2048\n", "\nMEGABYTES = 300\n"))
    assert file.read_text() != text
    made = Project(root, f"sqlite:///{root}/mlflow.db")
    register_constant(made, NAME, 1)
    with tracking(made.uri), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("WHILE_LOGGED", "1")
        for name, deed in CODE.items():
            (root / f"{name}.py").write_text(code_of(deed))
            example = pd.DataFrame({"a": [0.0, 1.0], "b": [1.0, 0.0]})
            mlflow.pyfunc.log_model(
                name="model", python_model=str(root / f"{name}.py"), signature=infer_signature(example, [0]),
                input_example=example, pip_requirements=[], registered_model_name=NAME,
            )  # fmt: skip
    register_constant(made, NAME, 3, champion=False)
    return made


REASONS = {
    "2": "version 2 is refused: the process that tried it ended with SIGSEGV",
    "3": "version 3 is refused: the process that tried it did not answer within 6 s",
    "4": "version 4 is refused: the process that tried it needed more than 301 MB",
}


def served_by(project: Project, cache: str, **env: str):
    return serving(project, f"registered_model_name={NAME}", "serve.trust_code=true", f"serve.cache={cache}", **env)


def point(project: Project, version: str, alias: str = "champion") -> None:
    MlflowClient(project.uri).set_registered_model_alias(NAME, alias, version)


def answers(served: Served) -> int:
    answered = served.ask("/invocations", REQUEST)
    assert answered.status == 200, answered
    return answered.body["predictions"][0]


@pytest.fixture
def gone() -> Iterator[Callable[[Served], None]]:
    """Remembers the processes of a server; at the end, when it was stopped, each of them must end."""
    seen: list[psutil.Process] = []
    yield lambda served: seen.extend(psutil.Process(served.process.pid).children(recursive=True))
    assert seen
    until(
        lambda: not [process for process in seen if process.is_running() and process.status() != "zombie"], lambda: seen
    )


def test_a_challenger_and_a_champion_that_crash_loop_and_devour(project: Project, gone):
    point(project, "1")
    point(project, "2", "challenger")
    with served_by(project, ".first") as served:  # a start with a challenger that crashes
        gone(served)
        for failures, (version, reason) in enumerate(REASONS.items(), 1):
            point(project, version, "challenger")
            served.wait("/status", model_version="1", error=f"{reason} (it is the challenger)")
            point(project, version)
            served.wait("/status", model_version="1", failures=failures, error=reason)
            assert answers(served) == 1
            point(project, "1")
        point(project, "5")
        served.wait("/status", model_version="5", failures=len(REASONS))
        assert answers(served) == 3
        assert served.stop() == 0


def test_a_start_with_a_champion_that_crashes(project: Project, gone):
    point(project, "2", "challenger")
    point(project, "2")
    with served_by(project, ".empty") as served:
        reason = f"{REASONS['2']}; no other version has served"
        until(lambda: reason in str(served.ask("/readyz").body), lambda: served.ask("/readyz"))
        assert served.ask("/readyz").status == 503
        gone(served)
        assert served.ask("/livez").status == 200 and served.stop(signal.SIGINT) == 0
    point(project, "5")
    with served_by(project, ".empty") as served:
        served.wait("/status", model_version="5")
    point(project, "2")
    [copy] = (project.root / ".empty").glob("*/2-*")
    (copy / "served").touch()  # as if it had served last
    with served_by(project, ".empty") as served:
        served.wait("/status", model_version="5", error=REASONS["2"])
        assert answers(served) == 3


def test_a_server_that_is_killed_leaves_no_process(project: Project, gone):
    point(project, "3", "challenger")
    point(project, "1")
    with served_by(project, ".killed") as served:
        served.wait("/status", model_version="1")
        server = psutil.Process(served.process.pid)
        until(lambda: len(server.children(recursive=True)) > PROCESSES)  # the child that loops is one of them
        gone(served)
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait(30)


def test_the_processes_hold_neither_socket_nor_database(project: Project):
    point(project, "3", "challenger")
    point(project, "1")
    with served_by(project, ".files") as served:
        served.wait("/status", model_version="1")
        answers(served)
        server = psutil.Process(served.process.pid)
        until(lambda: len(server.children(recursive=True)) > PROCESSES)
        for process in server.children(recursive=True):
            assert not [file for file in process.open_files() if ".db" in file.path]
            assert not [c for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert [c for c in server.net_connections("inet") if c.status == "LISTEN"]


# --- a step ---


@pytest.fixture
def careless(tmp_path: Path) -> Project:
    """A copy whose child loads a model without any check, as if the checks missed a forgery."""
    root = copy_project(tmp_path / "project")
    with (root / "alacarte/formats/probe.py").open("a") as file:
        file.write(f"\n\n{inspect.getsource(load_unchecked)}\n\nload = load_unchecked\n")
        file.write("import skops.io\nfrom mlflow.models import Model\n")
    return Project(root, f"sqlite:///{root}/mlflow.db")


def test_a_step_with_a_forged_model_ends_in_one_line(careless: Project, tmp_path: Path):
    folder = forged("neighbours far away", tmp_path / "model")
    ROWS.assign(label=LABELS).to_csv(tmp_path / "rows.csv", index=False)
    data = ("data=table", f"data.path={tmp_path}/rows.csv", "data.target=label")
    for step in (("score", f"input={tmp_path}/rows.csv", f"output={tmp_path}/answers.csv"), ("evaluate", *data)):
        run = careless.client.create_run("0")
        ended = careless.step(*step, f"model_uri={folder}", code=2, MLFLOW_RUN_ID=run.info.run_id)
        line = ended.stderr.strip().splitlines()[-1]
        assert line == f"{step[0]}: {folder}: the process that tried it ended with SIGSEGV"
        assert "Traceback" not in ended.stderr and careless.client.get_run(run.info.run_id).info.status == "FAILED"
