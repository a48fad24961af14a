"""The installed library, in an environment of its own: the command `alacarte` in an empty folder and in a project, and the
parts that the pages show alone."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import ROOT, command_output, commit, environment, new_store
from packaging.requirements import Requirement
from preloaded import programs

import alacarte

FOLDERS = ("conf", "examples", "project", "steps")
NOT_IN_IT = {"project/__init__.py"}  # so that a folder's own project/ and the default one are one package


class Folder:
    """A folder in which the command of the installed library runs."""

    def __init__(self, root: Path, environment_root: Path) -> None:
        self.root, self.command = root, str(environment_root / "bin" / "alacarte")
        self.env = environment(MLFLOW_TRACKING_URI=f"sqlite:///{root}/mlflow.db")
        root.mkdir(exist_ok=True)

    def run(self, *arguments: str, code: int = 0) -> str:
        """What the command prints; the last line of its errors where it is meant to fail."""
        command = [self.command, *arguments]
        ended = subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=900)
        assert ended.returncode == code, f"{arguments}\n{ended.stdout}\n{ended.stderr}"
        if not code:
            return ended.stdout
        assert "Traceback" not in ended.stderr
        return ended.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def empty(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("empty"), installed)


def packages_in(root: Path) -> Path:
    return next(root.glob("lib/python*/site-packages"))


def test_the_package_has_every_file_and_one_name(installed: Path):
    packages = packages_in(installed)
    files = [path for folder in ("alacarte", *FOLDERS) for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"} - NOT_IN_IT
    expected = {name if name.startswith("alacarte/") else f"alacarte/_template/{name}" for name in names}
    matches = {path.relative_to(packages).as_posix() for path in packages.rglob("*") if path.is_file()}
    assert {name for name in matches if ".dist-info/" not in name and not name.endswith((".pyc", ".pth"))} == expected


def all_packages(requirement: Requirement, lines: list[str]) -> set[str]:
    """The names of all packages that come with a requirement on a package with these lines, without other extras."""
    names: set[str] = set()
    for line in lines:
        part = Requirement(line)
        wanted = [
            extra for extra in ("", *requirement.extras) if not part.marker or part.marker.evaluate({"extra": extra})
        ]
        if wanted and part.name.lower() not in names:
            names.add(part.name.lower())
            try:
                names |= all_packages(part, requires(part.name) or [])
            except PackageNotFoundError:  # only named for another platform
                continue
    return names


def test_to_serve_needs_neither_torch_nor_matplotlib(installed: Path):
    (metadata,) = packages_in(installed).glob("alacarte-*.dist-info/METADATA")
    lines = re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(), re.M)
    serve = all_packages(Requirement("alacarte[serve]"), lines)
    assert {"fastapi", "mlflow-skinny", "scikit-learn", "scipy", "alembic"} <= serve
    assert not {"torch", "matplotlib", "mlflow"} & serve
    assert {"matplotlib", "mlflow"} <= all_packages(Requirement("alacarte[train]"), lines)
    assert {"torch", "safetensors"} <= all_packages(Requirement("alacarte[torch]"), lines)


def test_the_command_lists_the_entry_points_and_knows_its_version(empty: Folder):
    listed = [line.split(maxsplit=1) for line in empty.run().splitlines() if line.startswith("  ")]
    assert {name for name, _ in listed} == set(yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"])
    assert all(about for _, about in listed)
    assert empty.run("--version") == f"alacarte {alacarte.__version__}\n"
    assert empty.run("trian", code=2) == "alacarte: trian is not an entry point: did you mean 'train' or 'retrain'?"


def test_a_missing_package_is_one_line_before_the_step_starts(installed: Path, tmp_path: Path):
    folder, few = Folder(tmp_path / "bare", installed), tmp_path / "few"
    few.mkdir()
    for packaging in (Path(path, "packaging") for path in sys.path if path.endswith("site-packages")):
        (few / "packaging").symlink_to(packaging)
    file = packages_in(installed) / "tests.pth"
    before = file.read_text()
    try:
        file.write_text(str(few))
        assert folder.run("serve", code=2).endswith("is not installed: pip install 'alacarte[serve]'")
        assert folder.run("train", code=2).endswith("is not installed: pip install 'alacarte[train]'")
    finally:
        file.write_text(before)


def test_an_empty_folder_trains_evaluates_and_reuses(empty: Folder):
    arguments = ("main", "model=sklearn_sgd", "registered_model_name=first")
    assert "verdict   PROMOTE" in empty.run(*arguments)
    again = empty.run(*arguments)
    assert "train: reused run" in again and "evaluate: reused run" in again


def test_a_folder_with_its_own_conf_and_project(installed: Path, tmp_path: Path):
    own = Folder(tmp_path / "own", installed)
    (own.root / "project").mkdir()
    shutil.copytree(ROOT / "conf", own.root / "conf")
    for file in (own.root / "conf").glob("*.yaml"):  # of the root files, only those of one entry point
        if file.stem not in ("base", "train"):
            file.unlink()
    train = own.root / "conf" / "train.yaml"
    train.write_text(
        train.read_text().replace("model: sklearn_mlp", "model: sklearn_sgd").replace("seed: 0 ", "seed: 5 ")
    )
    digits = own.root / "conf" / "data" / "digits.yaml"
    digits.write_text(digits.read_text().replace("project.data.load_digits", "project.rows.load_some"))
    (own.root / "project" / "rows.py").write_text(
        "from project.data import load_digits  # of the library\n\n\n"
        "def load_some(**how):\n    return load_digits(**how)[:500]\n"
    )
    command_output(own.root, "git", "init", "--quiet")
    commit(own.root, "all")
    printed = own.run("train")
    rows = re.search(r"train: digits, (\d+) rows", printed)
    assert rows and int(rows[1]) < 500
    run = mlflow.MlflowClient(own.env["MLFLOW_TRACKING_URI"]).get_run(printed.splitlines()[-1].removeprefix("run_id="))
    assert run.data.params["seed"] == "5" and run.data.tags["git_dirty"] == "false"
    assert run.data.tags["mlflow.source.git.commit"] == command_output(own.root, "git", "rev-parse", "HEAD").strip()
    assert "evaluate.yaml" in own.run("evaluate", code=2)


def test_a_folder_with_its_own_steps(installed: Path, tmp_path: Path):
    own = Folder(tmp_path / "steps_of_ours", installed)
    for folder in ("conf", "steps"):
        (own.root / folder).mkdir()
    (own.root / "steps" / "__init__.py").touch()
    (own.root / "steps" / "greet.py").write_text(
        '"""greet: say hello."""\n\nfrom alacarte import launch\n\n\n'
        '@launch.step("greet", run=False)\ndef main(cfg):\n    print(f"hello {cfg.name}")\n\n\n'
        'if __name__ == "__main__":\n    main()\n'
    )
    (own.root / "conf" / "base.yaml").write_text((ROOT / "conf" / "base.yaml").read_text())
    (own.root / "conf" / "greet.yaml").write_text("defaults: [base, _self_]\nname: nobody\n")
    assert "  greet      say hello." in own.run()
    assert own.run("greet", "name=you") == "hello you\n"


@pytest.mark.parametrize("part", ["projects", "models", "registry", "serving", "feedback", "monitoring", "databricks"])
def test_a_part_alone(part: str, installed: Path, tmp_path: Path):
    _, _, section = (ROOT / "docs" / f"{part}.md").read_text().partition("\n## This part alone\n")
    rows = ["you get", "you need", "you can leave out", "to remove it"]
    assert re.findall(r"^\| ([a-z ]+) \| .+ \|$", section, re.M) == rows
    blocks = re.findall(r"^```bash alone\n(.*?)^```", section, re.M | re.S)
    assert bool(blocks) == (part != "databricks")  # which says that it needs a clone
    path = (
        f"{programs(str(installed / 'bin' / 'python'))}{os.pathsep}{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"
    )
    uri = new_store(tmp_path, f"{tmp_path}/mlruns")
    for block in blocks:
        printed = command_output(tmp_path, "bash", "-euo", "pipefail", "-c", block, PATH=path, MLFLOW_TRACKING_URI=uri)
    expected = {
        "projects": "hello you", "models": "[0 1", "registry": "PROMOTE", "serving": '{"predictions":[0]', "monitoring": "True",
        "feedback": "versicolor",
    }  # fmt: skip
    assert part == "databricks" or expected[part] in printed
