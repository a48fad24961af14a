"""The fingerprint of a run covers the modules that its step imports, and no other."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import copy_project

from alacarte import source

SGD = {
    "model": {"_target_": "alacarte.learners.sklearn.SklearnLearner"},
    "data": {"_target_": "project.data.load_digits"},
}
MLP = {"model": {"_target_": "alacarte.learners.torch.TorchLearner", "network": {"_target_": "project.networks.MLP"}}}


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = copy_project(tmp_path / "project")
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    monkeypatch.setattr(source, "ROOT", root)
    return root


@pytest.mark.parametrize(
    ("file", "step", "cfg", "counts"),
    [
        ("alacarte/serving/app.py", "train", SGD, False),
        ("alacarte/feedback/store.py", "train", SGD, False),
        ("steps/evaluate.py", "train", SGD, False),
        ("project/networks.py", "train", SGD, False),
        ("project/networks.py", "train", MLP, True),
        ("project/data.py", "train", SGD, True),
        ("project/__init__.py", "train", SGD, True),
        ("alacarte/learners/sklearn.py", "train", SGD, True),
        ("alacarte/data/splits.py", "train", SGD, True),  # imported by what the step imports
        ("alacarte/evaluation/plots.py", "evaluate", SGD, True),
        ("alacarte/serving/app.py", "evaluate", SGD, False),
        ("alacarte/serving/app.py", "serve", None, True),
        ("requirements.txt", "train", SGD, True),
        ("steps/train.py", "train", SGD, True),
    ],
)
def test_an_edit_counts_where_it_is_imported(copy: Path, file: str, step: str, cfg: dict | None, counts: bool):
    before = source.source_hash(step, cfg)
    assert source.source_hash(step, cfg) == before
    with (copy / file).open("a") as edited:
        edited.write("\n# edited\n")
    assert (source.source_hash(step, cfg) != before) == counts


@pytest.mark.parametrize(
    "line",
    [
        "from .own import scale", "from . import own", "from .own import (\n    other,\n    scale,\n)", "import project.own as o",
        "from project import data, own", "def late():\n    from project.own import scale", "from project \\\n    import own",
        "try: import project.own\nfinally: pass", "NAME = 'project.own.scale'",
    ],
)  # fmt: skip
def test_every_form_of_import_is_seen(copy: Path, line: str):
    (copy / "project" / "own.py").write_text("scale = 2\nother = 3\n")
    assert "project.own" not in source.modules_of(["project.data.load_digits"])
    (copy / "project" / "data.py").write_text(f"{line}\n")
    assert "project.own" in source.modules_of(["project.data.load_digits"])


def test_a_run_is_dirty_only_through_files_that_its_step_uses(copy: Path):
    """The project is a folder of a larger repository, with data that git does not know."""

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@e.org", *arguments], cwd=copy.parent, check=True
        )

    def dirty(step: str = "train", cfg: dict = SGD) -> str:
        return source.git_tags(source.source_of(step, cfg).values())["git_dirty"]

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "-m", "first")
    (copy / "houses.csv").write_text("a,b\n1,2\n")
    (copy.parent / "elsewhere.py").write_text("edited = True\n")
    (copy / "project" / "networks.py").open("a").write("# edited\n")
    assert dirty() == "false" and dirty(cfg=MLP) == "true" and dirty("main", SGD) == "true"
    (copy / "project" / "own.py").write_text("scale = 2\n")  # new, and not known to git
    assert dirty() == "false" and dirty(cfg={**SGD, "scale": "project.own.scale"}) == "true"
    git("checkout", "--quiet", "project/project/networks.py")
    (copy / "conf" / "train.yaml").open("a").write("# edited\n")
    assert dirty() == "true"
