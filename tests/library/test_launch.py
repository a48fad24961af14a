"""Any argument form gives the same configuration; text survives; mistakes end in one line."""

import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, environment, new_store
from hydra import compose, initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from omegaconf import OmegaConf
from people import refusal
from preloaded import programs

from alacarte import arguments, launch
from alacarte.help import help_text


def composed(*tokens: str, config: str = "train"):
    with initialize_config_dir(str(launch.CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(config, overrides=arguments.to_overrides(tokens)), resolve=True)


def test_every_form_means_the_same():
    wanted = composed("model.lr=0.1", "seed=7")
    assert (wanted["model"]["lr"], wanted["seed"]) == (0.1, 7)
    assert composed("--model.lr", "0.1", "--seed", "7") == wanted
    assert composed("--model.lr=0.1", "--seed=7") == wanted
    assert composed("-P", "model.lr=0.1", "-Pseed=7") == wanted
    assert composed("overrides=-P model.lr=0.1 -P seed=7") == wanted
    assert composed("--overrides", "model.lr=0.1 seed=7") == wanted
    assert composed("overrides=model.lr=0.1 --seed 7", "") == wanted


@pytest.mark.parametrize(
    "lose",
    [
        "thing = Thing(); weakref.finalize(thing, tell); del thing",
        "Thing.__del__ = lambda self: tell(); Thing()",
        "os.register_at_fork(after_in_parent=tell); os.fork() or os._exit(0)",
        "with contextlib.suppress(BaseException): tell()",
    ],
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_whose_exception_is_dropped_comes_back(tmp_path, lose, number, code):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "greet.py").write_text(
        "import contextlib, os, time, weakref\nfrom alacarte import launch\n\n\n"
        f"class Thing: pass\n\n\ndef tell():\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(0)\n\n\n"
        f"@launch.step('promote', run=False, offline=True)\ndef main(cfg):\n    try:\n        {lose}\n"
        "        time.sleep(10)\n        print('lost')\n    finally:\n"
        "        time.sleep(0.1)\n        print('closed')\n\n\nmain()\n"
    )
    command = [f"{programs()}/python", str(tmp_path / "steps" / "greet.py")]
    env = environment(PYTHONPATH=str(ROOT))
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (code, "closed\n") and "Traceback" not in ended.stderr, ended.stderr


def test_a_signal_inside_a_query_ends_the_run(tmp_path):
    """An exception there keeps its cursor in the traceback, which keeps SQLite's file locked: then the run cannot be closed."""
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "greet.py").write_text(
        "import os, signal, time\n\nimport mlflow\nfrom sqlalchemy import Engine, event\n\n"
        "from alacarte import launch, signals\n\n\n"
        "@launch.step('promote')\ndef main(cfg):\n"
        "    event.listen(Engine, 'after_cursor_execute', tell)\n    mlflow.log_metric('loss', 1)\n    time.sleep(10)\n\n\n"
        "def tell(connection, cursor, statement, *_):\n    if 'SELECT' in statement and not signals.arrived:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n\n\nmain()\n"
    )
    store = new_store(tmp_path, f"{tmp_path}/mlruns")
    env = environment(PYTHONPATH=str(ROOT), MLFLOW_TRACKING_URI=store)
    command = [f"{programs()}/python", str(tmp_path / "steps" / "greet.py")]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    (run,) = MlflowClient(store).search_runs(["0"])
    assert (ended.returncode, ended.stdout, ended.stderr, run.info.status) == (143, "", "", "KILLED")


def test_version_is_a_key_where_it_has_a_value():
    assert arguments.to_overrides(["--version", "previous"]) == ["version=previous"]
    assert arguments.to_overrides(["--version=3", "--cfg", "job"]) == ["--cfg", "job", "version=3"]
    assert arguments.to_overrides(["--version"]) == ["--version"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1", 0.1), ("1e-3", 1e-3), ("7", 7), ("true", True), ("null", None), ("[64,32]", [64, 32]), ("{a: 1}", {"a": 1}),
     ("'7'", "7"), ("a,b", "a,b"), ("range(1,3)", "range(1,3)"), ("[a", "[a"), ("", ""), (" a ", " a "), ("a=b", "a=b"),
     ("it's", "it's"), ("50 % #1 @x", "50 % #1 @x"), ("{x}", "{x}"), ("a: b, c", "a: b, c"), ("--x", "--x"), ("é\n\t", "é\n\t")],
)  # fmt: skip
def test_hydra_meaning_where_its_grammar_reads_the_value_and_plain_text_elsewhere(text, value):
    assert composed(f"seed={text}")["seed"] == value
    assert composed("--seed", text)["seed"] == value


@pytest.mark.parametrize("text", ["12345678901234567890123456789012", "1e400", "007", "true", "a b"])
def test_a_key_that_is_a_text_keeps_its_digits(text):
    """A run id may consist of digits alone; `true` is left for the check of the step to refuse."""
    assert str(composed(f"run_id={text}", config="evaluate")["run_id"]).lower() == text
    assert composed("run_id=null", config="evaluate")["run_id"] is None


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(lambda text: text != "???"))
@example("${seed}")
@example("\\${seed}\\")
@example("\\\\'\\")
@example("null")
@example("1,2 = {3} 'x\" #@%")
@settings(max_examples=100, deadline=None)
def test_free_text_survives_unchanged(text):
    quoted = arguments.quote(f"description={text}")
    cfg = OmegaConf.create({"description": arguments.parse(quoted).value(), "seed": 1})
    assert cfg.description == text


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        (["modle.lr=1"], "did you mean 'model.lr'"),
        (["model=torch_mpl"], "did you mean 'torch_mlp'"),
        (["model.lr=abc"], "model.lr=abc is not a number"),
        (["data=table", "data.target=y"], "data.path is required"),
        (["seed"], "seed=VALUE"),
        (["--seed"], "write --seed VALUE or seed=VALUE"),
        (["save_to=true"], "save_to=true is not a text"),
        (["registered_model_name=[a,b]"], "registered_model_name=['a', 'b'] is not a text"),
        (["overrides=a='b"], "quote it as a shell would"),
        (["data=null"], "data=null is unknown: there is digits, table"),
        (["features=null"], "features=null is unknown: there is image_sums, none, tabular"),
        (["model=5"], "model=5 is unknown: there is keras_mlp"),
    ],
)
def test_a_mistake_is_one_line(tokens: list[str], line: str):
    assert line in refusal(launch.compose, "train", tokens)


def test_null_is_taken_for_a_group_that_has_no_option_anyway(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    cfg = launch.compose("evaluate", ["data=null", "feedback=null", "run_id=0"])
    assert cfg is not None and not cfg.get("data") and not cfg.get("feedback")
    assert launch.take_null(["--multirun", "experiment=null", "seed=1,2"], "train") == ["--multirun", "seed=1,2"]
    assert "data=digits,null is unknown" in refusal(launch.take_null, ["data=digits,null"], "train")


def test_a_wrong_value_of_a_hydra_flag_is_one_line():
    assert "invalid choice: 'jobb'" in refusal(launch.check_flags, ["--cfg", "jobb"])


@pytest.mark.parametrize("config", sorted(path.stem for path in launch.CONF.glob("*.yaml") if path.stem != "base"))
def test_help_lists_every_key_with_its_comment(config: str):
    text = help_text(launch.CONF, config, {"model": "torch_mlp"})
    shown = set(re.findall(r"^(\w+)[:=]", text, flags=re.M))
    assert shown >= launch.keys_of(config) and not {"defaults", "hydra"} & shown
    assert "registered_model_name: " in text and "name in the registry" in text
    if config == "main":
        assert "\n  patience: 8 " in text and "torch_mlp" in text and "true: skip a step if" in text


def test_a_python_without_the_packages_is_one_line():
    command = [sys.executable, "-S", "-m", "steps.train"]  # -S: without installed packages
    ended = subprocess.run(command, cwd=ROOT, env=environment(PYTHONPATH=""), capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("steps: this Python has no mlflow: ")
    assert len(ended.stderr.splitlines()) == 1
