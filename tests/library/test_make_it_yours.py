"""docs/make-it-yours.md, followed literally in a fresh copy of the project."""

import re
from pathlib import Path

import pandas as pd
from conftest import ROOT, Project, copy_project


def test_the_page(tmp_path: Path):
    root = copy_project(tmp_path / "project")
    project = Project(root, f"sqlite:///{root}/mlflow.db")
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/make-it-yours.md").read_text(), flags=re.M | re.S)
    for block in blocks:
        project.run("bash", "-euo", "pipefail", "-c", block)
    versions = project.client.search_model_versions("name='orders'")
    assert len(versions) >= 3 and project.client.get_model_version_by_alias("orders", "champion")
    answers = pd.read_csv(root / "answers.csv")
    assert len(answers) == 4 and set(answers["prediction"]) <= {"yes", "no"}
