"""A framework that docs/models.md adds in one file of `project/`, and a package that is missing."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, Project, tracking
from hydra.errors import HydraException
from mlflow import MlflowClient

from alacarte import launch
from alacarte.errors import UserError
from alacarte.formats.frameworks import import_extra

STOCK = """
import json, sys, mlflow, pandas as pd
rows = pd.read_csv(sys.argv[2])
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(rows).tolist()))
assert "/elsewhere" not in (sys.modules["project"].__file__), "the copy in the model is used"
"""


@pytest.mark.parametrize("package", ["lightgbm>=4.7,<5", "xgboost-cpu>=3.2,<4", "keras>=3.15,<4", "torch>=2.13,<2.14"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch):
    module = re.split("[->]", package)[0]
    monkeypatch.setitem(sys.modules, module, None)
    output = f"{module} is not installed, and this model needs it: pip install '{package}'"
    with pytest.raises(UserError, match=re.escape(output)):
        import_extra(module)


def test_a_model_whose_package_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    monkeypatch.delitem(sys.modules, "alacarte.learners.lightgbm", raising=False)
    monkeypatch.delattr("alacarte.learners.lightgbm", raising=False)
    cfg = launch.compose("train", ["model=lightgbm"])
    with pytest.raises(HydraException) as caught:
        launch.instantiate(cfg.model)
    assert launch.explain(caught.value, "train").startswith("model: lightgbm is not installed")


def test_the_framework_of_the_docs(project: Project, tmp_path: Path):
    page = (ROOT / "docs/models.md").read_text()
    [block] = re.findall(r"^```bash\n(cat > project/centroids\.py.*?)^```", page, flags=re.M | re.S)
    project.run("bash", "-euo", "pipefail", "-c", block.replace("steps.pipeline", "steps.pipeline data.stop=600"))
    with tracking(project.uri):
        version = MlflowClient().get_model_version_by_alias("centroids", "champion")
        rows = tmp_path / "rows.csv"
        script = (
            "import sys; from project.data import load_digits; load_digits(stop=50).to_csv(sys.argv[1], index=False)"
        )
        project.run("python", "-c", script, str(rows))
    answers = tmp_path / "answers.csv"
    project.step("score", f"input={rows}", f"output={answers}", "registered_model_name=centroids")
    scored = pd.read_csv(answers)
    assert (scored["prediction"] == scored["digit"]).mean() > 0.7
    # stock MLflow, in a folder without this project
    elsewhere = Project(tmp_path / "elsewhere", project.uri)
    elsewhere.root.mkdir()
    (elsewhere.root / "stock.py").write_text(STOCK)
    stock = elsewhere.run(sys.executable, "stock.py", f"models:/centroids/{version.version}", str(rows))
    assert json.loads(stock.stdout.splitlines()[-1]) == scored["prediction"].tolist()
    # trained further, from the checkout
    further = """if True:
        import sys
        from alacarte import learners
        from project.data import load_digits
        frame = load_digits(start=600, stop=900)
        X, y = frame.drop(columns="digit"), frame["digit"]
        model = learners.load(sys.argv[1])
        update = model.update(X, y, X, y, init="warm", share=0.2, shrink=0.8, seed=0)
        assert (update.init, type(model).__name__) == ("warm", "CentroidLearner"), update
    """
    with tracking(project.uri):
        from mlflow.artifacts import download_artifacts

        folder = download_artifacts(f"models:/centroids/{version.version}", dst_path=str(tmp_path / "model"))
    project.run("python", "-c", further, folder)
    # a process without the file: one line, and the copy in the model is not used
    (project.root / "project/centroids.py").unlink()
    refused = project.step(
        "score", f"input={rows}", f"output={tmp_path}/no.csv", "registered_model_name=centroids", code=2
    )
    assert "the model needs the module project.centroids, which is not in this checkout" in refused.stderr
    assert "Traceback" not in refused.stderr
