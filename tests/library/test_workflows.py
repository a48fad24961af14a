"""The files for CI are valid, and each command in them runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Project, environment

SCHEMAS = {
    ".github/workflows/ci.yml": "vendor.github-workflows",
    ".github/workflows/retrain.yml": "vendor.github-workflows",
    ".github/workflows/promote.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
    ".gitlab-ci.yml": "vendor.gitlab-ci",
}
NAME = "workflow"
ENV = {
    "ARGS": "--collect-only",  # pytest collects the tests of `make test`, but does not run them inside a test
    "PIP_DRY_RUN": "1",  # pip resolves, but does not change this environment
    "REGISTERED_MODEL_NAME": NAME,
    "FEEDBACK_URL": "sqlite:///feedback.db",
    "VERSION": "1",
    "REASON": "reviewed, and 'approved'",
}


def jobs(file: str) -> dict[str, list[str]]:
    """The commands of each job of a workflow file."""
    content = yaml.safe_load((ROOT / file).read_text())
    if "jobs" in content:
        return {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in content["jobs"].items()}
    return {name: job["script"] for name, job in content.items() if "script" in (job or {})}


COMMANDS = sorted(
    {command for file in SCHEMAS if "depend" not in file for job in jobs(file).values() for command in job}
)


@pytest.mark.parametrize("file", SCHEMAS)
def test_files_are_valid(file: str):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[file], str(ROOT / file)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the files that git knows, with a model that the gate accepted."""
    root = tmp_path_factory.mktemp("checkout")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in filter(None, files.split("\0")):
        if (ROOT / file).is_file():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, root / file)
    (root / ".venv").symlink_to(sys.prefix)
    project = Project(root, f"sqlite:///{root}/mlflow.db")
    project.step("pipeline", "model=sklearn_sgd", f"registered_model_name={NAME}")
    return project


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(checkout: Project, command: str):
    """As the runners do it: `bash -e` in the checkout. retrain has no labels, promote finds its version in place."""
    env = environment(MLFLOW_TRACKING_URI=checkout.uri, **ENV)
    ended = subprocess.run(["bash", "-e", "-c", command], cwd=checkout.root, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if "steps.retrain" in command:
        assert "nothing to do" in ended.stdout
    if "steps.promote" in command:
        assert f"{NAME} version 1" in ended.stdout


def test_secrets_reach_commands_only_as_variables():
    """An expression inside a command could run text that somebody else wrote."""
    for file in SCHEMAS:
        assert not re.search(r"run:.*\$\{\{", (ROOT / file).read_text())


def test_pre_commit_runs_the_tools_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        tool, *arguments = hook["entry"].split()
        assert Path(tool).name == "ruff"
        command = [sys.executable, "-m", "ruff", *arguments, "steps/train.py"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
