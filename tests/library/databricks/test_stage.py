"""What goes to Databricks and what does not, and what is refused before a cluster starts. No workspace is asked here."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from people import refusal
from workspace import checkout_at, git

from alacarte import stores
from alacarte.arguments import to_overrides
from alacarte.databricks import stage
from alacarte.databricks import submit as databricks
from alacarte.errors import UserError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return checkout_at(tmp_path / "project")


def test_only_what_git_knows_is_staged(checkout: Path):
    (checkout / ".env").write_text("TOKEN=x")
    (checkout / "mlflow.db").write_text("x")
    (checkout / "houses.csv").write_text("a,b\n1,2\n")
    (checkout / "gone.py").write_text("")
    git(checkout, "add", "houses.csv", "gone.py")
    (checkout / "gone.py").unlink()
    (checkout / "project" / "data.py").write_text("# edited, not committed\n")
    to = checkout / "build" / "databricks"
    assert stage.stage(checkout, {}) == ["houses.csv"]
    listed = subprocess.run(["git", "ls-files"], cwd=checkout, capture_output=True, text=True, check=True)
    matches = {path.relative_to(to).as_posix() for path in to.rglob("*") if path.is_file()}
    assert matches == {*listed.stdout.split(), "git_tags.json"} - {"houses.csv", "gone.py"}
    assert (to / "project" / "data.py").read_text() == "# edited, not committed\n"
    (checkout / "new.py").write_text("")
    git(checkout, "add", "new.py")
    stage.stage(checkout, {})
    assert (to / "new.py").is_file()
    assert [path.name for path in to.parent.iterdir()] == ["databricks"]


def test_the_job_has_every_entry_point_and_every_pin():
    from test_pins import pins

    project, here = stage.spark_project(ROOT), yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert set(project["entry_points"]) == set(here) - {"serve"}
    for name, entry in project["entry_points"].items():
        assert entry["command"] == here[name]["command"].replace("python -m", "python databricks/boot.py")
    libraries = project["databricks_spark_job"]["python_libraries"]
    assert dict(each.split("==") for each in libraries) == pins("requirements.txt")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (".env", "A=1", "by its name a secret"),
        ("keys/server.pem", "x", "by its name a secret"),
        ("notes.txt", "token: dapi" + "0a" * 16, "looks like a secret, dapi0a0a"),
        ("key.txt", "-----BEGIN RSA " + "PRIVATE KEY-----", "looks like a secret"),
        ("weights.bin", "x" * 1_000_001, "1,000,001 bytes"),
        ("databricks/boot.py", None, "databricks/boot.py is not in git"),
        ("link.txt", "link", "leads out of the project"),
        ("MLproject", "entry_points: {more: {command: bash more.sh}}", "entry point more is `bash more"),
    ],
)  # fmt: skip
def test_what_must_not_leave_is_refused(checkout: Path, name: str, content: str | None, line: str):
    to = checkout / "build" / "databricks"
    stage.stage(checkout, {})
    before = sorted(to.rglob("*"))
    path = checkout / name
    if content is None:
        git(checkout, "rm", "--quiet", "--cached", name)
    elif content == "link":
        (checkout.parent / "outside.txt").write_text("x")
        path.symlink_to(checkout.parent / "outside.txt")
        git(checkout, "add", name)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        git(checkout, "add", "--force", name)
    with pytest.raises(UserError, match=line):
        stage.stage(checkout, {})
    assert sorted(to.rglob("*")) == before


def test_only_what_linux_needs_is_a_library(tmp_path: Path):
    lines = ("# pins", "a==1", 'b==2; sys_platform != "win32"  # why', 'c==3; sys_platform == "win32"', "")
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    assert stage.libraries(tmp_path) == ["a==1", "b==2"]


CLUSTER = json.loads((ROOT / "databricks" / "cluster.json").read_text())


@pytest.mark.parametrize(
    ("cluster", "line"),
    [
        ({"new_cluster": CLUSTER}, "new_cluster is not allowed"),
        ({**CLUSTER, "libraries": []}, "libraries is not allowed"),
        ({**CLUSTER, "spark_version": ""}, "spark_version is missing"),
        ({**CLUSTER, "node_type_id": None}, "node_type_id or instance_pool_id is missing"),
        ([CLUSTER], "holds list"),
    ],
)
def test_a_cluster_that_cannot_work_is_refused(tmp_path: Path, cluster: object, line: str):
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(cluster))
    assert f"--backend-config {path}" in refusal(stage.read_cluster, path) and line in refusal(stage.read_cluster, path)
    assert stage.read_cluster(ROOT / "databricks" / "cluster.json") == CLUSTER


@pytest.mark.parametrize(
    ("arguments", "uri", "line"),
    [
        (("stage",), "sqlite:///mlflow.db", "a store on this machine"),
        (("run", "train"), "http://127.0.0.1:1", "your own server"),
        (("run", "main"), "databricks", "such as main.default.alacarte"),
        (("run", "main", "registered_model_name=a..b"), "databricks", "such as main.default.b"),
        (("run", "train", "modle.lr=1"), "databricks", "did you mean 'model.lr'"),
        (("run", "train", "--cfg", "job"), "databricks", "does nothing in a job"),
        (("run", "trian"), "databricks", "choose one of main, train"),
        (("run", "serve"), "databricks", "there is the endpoint of databricks/databricks.yml"),
        (("run", "train", "--experiment-name", "mine"), "databricks", "write /Shared/mine"),
        (("run", "train", "--backend-config", "none.json"), "databricks", "see databricks/cluster.json"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_sent(capsys, monkeypatch, arguments: tuple, uri: str, line: str):
    """There is no workspace here: whoever asked one would hear so."""
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: uri)
    monkeypatch.setattr("mlflow.get_registry_uri", lambda: "databricks-uc")
    assert databricks.main(arguments) == 2
    output = capsys.readouterr().err
    assert line in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [(None, "experiment_name=null: Databricks asks for a path, such as /Shared/alacarte"), ("mine", "such as /Shared/mine")],
)  # fmt: skip
def test_hosted_tracking_asks_for_an_experiment(monkeypatch: pytest.MonkeyPatch, name: str | None, line: str):
    for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "databricks")
    with pytest.raises(UserError, match=line):
        stores.use_experiment(name)


def test_the_words_of_run_mean_there_what_they_mean_here():
    tokens = [
        "--description",
        "it's  two words",
        "--multirun",
        "overrides=seed=3 data.name='a b'",
        "+more=[1,2]",
        "save_to=",
    ]
    (parameter,) = databricks.as_parameters(tokens).items()
    assert to_overrides((f"--{parameter[0]}", parameter[1])) == to_overrides(tokens)
    assert databricks.as_parameters([]) == {}
