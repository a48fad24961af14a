"""Each part is used alone, as its page says: in an empty folder, with nothing but the installed library."""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command_output

PARTS = ("projects", "models", "registry", "serving", "feedback", "monitoring", "databricks")
ROWS = ("you get", "you need", "you can leave out", "to remove it")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone(part: str, installed: Path, tmp_path: Path):
    _, _, section = (ROOT / "docs" / f"{part}.md").read_text().partition("\n## This part alone\n")
    assert re.findall(r"^\| ([a-z ]+) \| .+ \|$", section, re.M) == list(ROWS)
    blocks = re.findall(r"^```bash alone\n(.*?)^```", section, re.M | re.S)
    assert bool(blocks) == (part != "databricks")  # which says that it needs a clone
    path = f"{installed / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks:
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        printed = command_output(tmp_path, "bash", "-euo", "pipefail", "-c", block, PATH=path, MLFLOW_TRACKING_URI=uri)
    expected = {
        "projects": "hello you", "models": "[0 1", "registry": "PROMOTE", "serving": '{"predictions":[0]', "monitoring": "True",
        "feedback": "versicolor",
    }  # fmt: skip
    assert part == "databricks" or expected[part] in printed
