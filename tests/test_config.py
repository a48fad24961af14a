"""Every configuration composes, every model in it can be made, and each default has one home."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from alacarte import launch

ENTRY_POINTS = yaml.safe_load((launch.CONF.parent / "MLproject").read_text())["entry_points"]
GROUPS = sorted(path.relative_to(launch.CONF) for path in launch.CONF.glob("*/*.yaml"))
REQUIRED = {
    "data=table": ["data.path=x.csv", "data.target=y"],
    "model=sklearn": ["model.estimator._target_=sklearn.svm.SVC"],
}


def composed(config: str, *overrides: str):
    with initialize_config_dir(str(launch.CONF), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def test_each_entry_point_has_a_configuration_and_a_script():
    for name, entry in ENTRY_POINTS.items():
        module = entry["command"].removeprefix("python -m ")
        assert (launch.CONF / f"{name}.yaml").is_file()
        assert (launch.CONF.parent / f"{module.replace('.', '/')}.py").is_file()
        assert "parameters" not in entry, "defaults live in conf/ alone"


def test_the_people_of_the_demo_are_not_limited_as_one_client():
    """All their labels, at most one for each request, come from one address."""
    cfg = composed("demo", "demo.per_second=500")
    assert cfg.serve.feedback_per_minute >= 60 * cfg.demo.per_second > composed("serve").serve.feedback_per_minute


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_each_option_composes_and_can_be_made(path: Path):
    group, option = path.parent.name, path.stem
    config = {
        "gate": "evaluate",
        "serve": "serve",
        "feedback": "serve",
        "retrain": "retrain",
        "monitor": "monitor",
    }.get(group, "train")
    choice = f"{group}={option}"
    cfg = composed(config, choice, *REQUIRED.get(choice, []))
    OmegaConf.to_container(cfg, resolve=True)
    assert OmegaConf.missing_keys(cfg) == set()
    if group == "model":
        assert hasattr(instantiate(cfg.model), "fit")
    if group == "data":
        assert callable(get_method(cfg.data._target_))


def test_an_experiment_wins_over_the_defaults_and_the_command_line_over_it(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /metrics: cost\nseed: 5\nreuse: false\ngate: {margin: 0.5}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    mine = composed("main", "experiment=mine", f"hydra.searchpath=[{tmp_path}]")
    assert (mine.seed, mine.reuse, mine.gate.margin, list(mine.metrics)) == (5, False, 0.5, ["cost"])
    quick = composed("main", "experiment=quick")
    assert quick.data.stop == 600 and quick.model.classifier._target_.endswith("SGDClassifier")
    typed = composed("main", "experiment=quick", "model=sklearn_forest", "data.stop=900")
    assert typed.data.stop == 900 and typed.model == composed("main", "model=sklearn_forest").model


@pytest.mark.parametrize("path", sorted(launch.CONF.rglob("*.yaml")), ids=lambda path: path.name)
def test_each_file_opens_with_the_command_that_runs_it(path: Path):
    lines = path.read_text().splitlines()
    first = lines[lines[0].startswith("# @package ")]  # which Hydra reads in the first line alone
    assert first.startswith(("# mlflow run .", "# python -m steps.", "# What every entry point takes")), first
    assert "-P +" not in path.read_text(), "MLflow allows no sign in the name of a parameter: -P overrides=+KEY=VALUE"


def test_main_takes_what_train_and_evaluate_take():
    main = launch.keys_of("main")
    assert launch.keys_of("train") <= main
    assert launch.keys_of("evaluate") - {"run_id", "model_uri"} <= main
    assert launch.keys_of("train") == set(composed("train")) - {"experiment"}


def test_the_pipeline_hands_each_step_the_configuration_it_would_compose_itself():
    whole = composed("main", "model=sklearn_sgd", "seed=3")
    alone = composed("train", "model=sklearn_sgd", "seed=3")
    assert launch.part_of(whole, "train") == OmegaConf.create(OmegaConf.to_container(alone, resolve=True))
