"""The notebook, from a clean kernel, on the embedded store."""

import shutil
from pathlib import Path

import nbformat
from conftest import ROOT, copy_project, environment
from mlflow import MlflowClient
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_it_trains_evaluates_and_predicts(tmp_path: Path):
    root = copy_project(tmp_path / "project")
    shutil.copytree(NOTEBOOK.parent, root / "notebooks")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(root / "notebooks")}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    client.execute(env=environment(HOME=str(tmp_path), IPYTHONDIR=str(tmp_path / "ipython")))
    output = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    text = "".join(out.text for out in output if out.output_type == "stream")
    champion = MlflowClient(f"sqlite:///{root}/mlflow.db").get_model_version_by_alias("alacarte", "champion")
    assert "PROMOTE" in text and champion.run_id in text
    assert "predicted " in text and "it is 0" in text
    assert any("image/png" in out.get("data", {}) for out in output)


def test_it_is_kept_without_what_it_printed():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
