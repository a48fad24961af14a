"""The fingerprint of a run covers the modules that its step imports, and no other."""

import sys
from pathlib import Path

import pytest
from conftest import command_output, commit, copy_project

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
    ("step", "cfg", "counting", "others"),
    [
        (
            "train", SGD,
            ["steps/train.py", "project/data.py", "project/__init__.py", "alacarte/learners/sklearn.py",
             "alacarte/data/splits.py", "requirements.txt"],
            ["alacarte/serving/app.py", "alacarte/feedback/store.py", "steps/evaluate.py", "project/networks.py"],
        ),
        ("train", MLP, ["project/networks.py"], ["alacarte/serving/app.py"]),
        ("evaluate", SGD, ["alacarte/evaluation/plots.py"], ["alacarte/serving/app.py"]),
        ("serve", None, ["alacarte/serving/app.py"], ["steps/train.py"]),
    ],
)  # fmt: skip
def test_an_edit_counts_where_it_is_imported(
    copy: Path, step: str, cfg: dict | None, counting: list[str], others: list[str]
):
    for file in (*counting, *others):
        before = source.source_hash(step, cfg)
        with (copy / file).open("a") as edited:
            edited.write("\n# edited\n")
        assert (source.source_hash(step, cfg) != before) == (file in counting), file


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

    def dirty(step: str = "train", cfg: dict = SGD) -> str:
        return source.git_tags(source.source_of(step, cfg).values())["git_dirty"]

    command_output(copy.parent, "git", "init", "--quiet")
    commit(copy.parent, "first")
    (copy / "houses.csv").write_text("a,b\n1,2\n")
    (copy.parent / "elsewhere.py").write_text("edited = True\n")
    (copy / "project" / "networks.py").open("a").write("# edited\n")
    assert dirty() == "false" and dirty(cfg=MLP) == "true" and dirty("main", SGD) == "true"
    (copy / "project" / "own.py").write_text("scale = 2\n")  # new, and not known to git
    assert dirty() == "false" and dirty(cfg={**SGD, "scale": "project.own.scale"}) == "true"
    command_output(copy, "git", "checkout", "--quiet", "project/networks.py")
    (copy / "conf" / "train.yaml").open("a").write("# edited\n")
    assert dirty() == "true"
