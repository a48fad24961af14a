"""The commands in docs/ run as printed, page by page, in a fresh copy of the project."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, Project
from mlflow import MlflowClient
from workspace import checkout_at, stand_in

PAGES = sorted((ROOT / "docs").glob("*.md"))
# Pages without commands for bash. test_stack.py and test_template.py run what the last three show.
WITHOUT_COMMANDS = {"screenshots", "kubernetes", "stack", "updating"}


def follow(page: Path, project: Project, **env: str) -> None:
    """Run each block in a shell of its own, so that a server started in one ends with it."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    assert blocks, f"{page.name} shows no command"
    for block in blocks:
        project.run("bash", "-euo", "pipefail", "-c", block, **env)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in WITHOUT_COMMANDS], ids=lambda page: page.stem
)
def test_page(page: Path, new_project: Callable[[Path], Project], tmp_path: Path):
    if page.stem == "databricks":
        with stand_in(tmp_path) as workspace:
            follow(page, Project(checkout_at(tmp_path / "project"), ""), **workspace.env())
            client = MlflowClient(workspace.server)
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            tags = [run.data.tags for run in client.search_runs(experiments, "tags.step = 'evaluate'")]
            assert all(each["source_run_id"] for each in tags)
            assert ["mlflow.parentRunId" in each for each in tags] == [False, True]  # the job, and the pipeline's child
        return
    project = new_project(tmp_path / "project")
    follow(page, project)
    if page.stem == "make-it-yours":
        versions = project.client.search_model_versions("name='orders'")
        assert len(versions) >= 3 and project.client.get_model_version_by_alias("orders", "champion")
        answers = pd.read_csv(project.root / "answers.csv")
        assert len(answers) == 4 and set(answers["prediction"]) <= {"yes", "no"}


def test_every_local_link_leads_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
