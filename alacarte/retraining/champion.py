"""The version in production with all that belongs to it: its model, and the data it was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alacarte import learners, registry
from alacarte.data.dataset import Dataset, load_data, recorded
from alacarte.errors import UserError
from alacarte.learners import Learner


@dataclass(frozen=True, eq=False)
class Champion:
    name: str
    number: str
    model: registry.Located
    learner: Learner
    data: dict[str, Any]  # what load_data takes
    dataset: Dataset

    def heritage(self, run_id: str) -> dict[str, Any]:
        """The metadata of a model that the run `run_id` made from this one."""
        about = {"data": self.data, "dataset_digest": self.dataset.digest, "task": self.dataset.task}
        about |= {"target": self.dataset.target, "run_id": run_id}
        return about | {"parent_version": self.number, "parent_run_id": self.model.run_id}


def load_champion(name: str, data: Mapping[str, Any] | None = None) -> Champion:
    """The champion of a registered model and its data: those it records, whose digest is checked, or else `data`.

    Raises UserError where there is no champion, where it records no data, and where these have changed since.
    """
    version = registry.champion_of(name)
    if version is None:
        raise UserError(f"registered_model_name={name} has no champion: make the first one with `mlflow run .`")
    number = registry.number_of(version)
    model = registry.locate(f"models:/{name}/{number}")
    learner = learners.load(model.path)
    if data:
        dataset = load_data(**data)
        absolute = {"path": dataset.source} if "path" in data else {}  # for whoever works from another folder
        return Champion(name, number, model, learner, {**data, **absolute}, dataset)
    known = model.metadata.get("data")
    if not known:
        raise UserError(
            f"version {number} of {name} does not record its data: add -P data=... with what it learned from"
        )
    dataset = load_data(**recorded(known))
    digest = model.metadata.get("dataset_digest")
    if dataset.digest != digest:
        raise UserError(
            f"the data of version {number} of {name} have changed: their digest was {digest} and is {dataset.digest}: "
            "add -P data=... to take them as they are now"
        )
    return Champion(name, number, model, learner, known, dataset)
