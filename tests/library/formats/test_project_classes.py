"""Classes and functions of `project` in a skops file: only those that a module of this checkout defines."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.preprocessing import FunctionTransformer
from test_check import LABELS, X, dump, forge

import project.features
from alacarte import formats
from alacarte.errors import UserError


@pytest.mark.parametrize(
    "name",
    [
        *("features.FunctionTransformer", "features.np", "features.missing", "features.add_sums.__call__", "missing.f"),
        *("networks.nn.Module", "features.__builtins__", "features.__doc__", "__init__.os"),
    ],
)
@pytest.mark.parametrize("kind", ["ObjectNode", "FunctionNode"])
def test_only_what_a_module_of_the_project_defines_is_accepted(name: str, kind: str, tmp_path: Path) -> None:
    module, _, last = f"project.{name}".rpartition(".")
    node = {"__class__": last, "__module__": module, "__loader__": kind}
    with pytest.raises(UserError, match="at the top level of a module of this checkout"):
        formats.check_types(forge(tmp_path / "model.skops", node))


def test_a_project_from_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after stock MLflow has put the copy of a model on the path."""
    path = dump(FunctionTransformer(project.features.add_sums), tmp_path / "model.skops")
    assert "project.features.add_sums" in formats.check_types(path)
    monkeypatch.setattr(project.features, "__file__", str(tmp_path / "code/project/features.py"))
    with pytest.raises(UserError, match="which is not in this checkout"):
        formats.check_types(path)


def test_attributes_of_a_class_of_the_project_are_checked() -> None:
    class Subclass(RandomForestClassifier):
        pass

    Subclass.__module__ = "project.models"
    model = Subclass(2, random_state=0).fit(X, LABELS)
    model.estimators_[0].tree_.children_left[0] = 10**9
    with pytest.raises(UserError, match="not one after it"):
        formats.objects.check_object(model, "the model")
    model = Subclass(2).fit(X, LABELS)
    model.predict = np.asarray
    with pytest.raises(UserError, match="would take the place of a method"):
        formats.objects.check_object(model, "the model")
