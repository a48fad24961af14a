"""The files for CI are valid, and each command in them runs."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Project, command_output

SCHEMAS = {
    ".github/workflows/ci.yml": "vendor.github-workflows",
    ".github/workflows/retrain.yml": "vendor.github-workflows",
    ".github/workflows/promote.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
    ".gitlab-ci.yml": "vendor.gitlab-ci",
}
NAME = "workflow"
ENV = {
    "ARGS": "--collect-only tests/test_project.py",  # the tests do not run inside a test
    "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache"),
    "PIP_DRY_RUN": "1",  # pip resolves, but does not change this environment
    "REGISTERED_MODEL_NAME": NAME,
    "FEEDBACK_URL": "sqlite:///feedback.db",
    "VERSION": "1",
    "REASON": "reviewed, and 'approved'",
}


def commands(file: str) -> set[str]:
    """The commands in a workflow file."""
    content = yaml.safe_load((ROOT / file).read_text())
    if "jobs" in content:
        return {step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step}
    return {line for job in content.values() if isinstance(job, dict) for line in job.get("script", ())}


COMMANDS = sorted(set().union(*map(commands, (file for file in SCHEMAS if "depend" not in file))))


@pytest.mark.parametrize("file", SCHEMAS)
def test_files_are_valid(file: str):
    command_output(ROOT, sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[file], file)


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the files that git knows, with a model that the gate accepted."""
    root = tmp_path_factory.mktemp("checkout") / "project"
    command_output(root.parent, "git", "clone", "-q", str(repository), str(root))
    (root / ".venv").symlink_to(sys.prefix)
    project = Project(root, f"sqlite:///{root}/mlflow.db")
    project.step("pipeline", "model=sklearn_sgd", f"registered_model_name={NAME}")
    return project


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(checkout: Project, command: str):
    """As the runners do it: `bash -e` in the checkout. retrain has no labels, promote finds its version in place."""
    printed = checkout.run("bash", "-e", "-c", command, **ENV).stdout
    if "steps.retrain" in command:
        assert "nothing to do" in printed
    if "steps.promote" in command:
        assert f"{NAME} version 1" in printed


def test_secrets_reach_commands_only_as_variables():
    """An expression inside a command could run text that somebody else wrote."""
    for file in SCHEMAS:
        assert not re.search(r"run:.*\$\{\{", (ROOT / file).read_text())


def test_pre_commit_runs_the_tools_of_make_check():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        tool, *arguments = hook["entry"].split()
        assert Path(tool).name == "ruff"
        command_output(ROOT, sys.executable, "-m", "ruff", *arguments, "steps/train.py")
