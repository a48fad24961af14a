"""The version in production, with its model and its training data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alacarte import learners, registry
from alacarte.data.dataset import DataReader, Dataset
from alacarte.evaluation.rows import leave_out_trained, records
from alacarte.feedback.queries import Labelled
from alacarte.learners import Learner
from alacarte.retraining.selection import TAKEN, Choice, choose, most_labels, select

RECORD = ("data", "dataset_digest", "column_types", "trained_rows")  # what a model records of its parent's data
MOST_ANCESTORS = 20  # with other data, the newest first


@dataclass(frozen=True, eq=False)
class Champion:
    name: str
    number: str
    model: registry.Located
    learner: Learner
    data: dict[str, Any]  # what load_data takes
    dataset: Dataset

    def lineage_metadata(self, run_id: str, init: str) -> dict[str, Any]:
        """The metadata of a model that the run `run_id` made from this one.

        `ancestors_data` are data that this model and its ancestors were trained on. From scratch, a model learns nothing of them.
        """
        about = {"data": self.data, **self.dataset.metadata, "run_id": run_id}
        about["ancestors_data"] = [
            {key: record[key] for key in RECORD if key in record}
            for record in records("", self.model.metadata).values()
            if record.get("data") and record.get("dataset_digest") != self.dataset.digest
            and init != "scratch" and not self.dataset.contains(record)
        ][:MOST_ANCESTORS]  # fmt: skip
        return about | {"parent_version": self.number, "parent_run_id": self.model.run_id}


def load_champion(name: str, data: Mapping[str, Any] | None = None) -> Champion:
    """The champion of a registered model with `data`, or without `data` with its recorded data, whose digest is
    checked.

    The test part is without rows that the champion or its ancestors were trained on.

    Raises UserError if there is no champion, or, without `data`, if it records no data or its data have changed.
    """
    number = registry.number_of(registry.require_champion(name))
    model = registry.locate(f"models:/{name}/{number}")
    learner = learners.load(model.path)
    read = DataReader()
    if data:
        dataset = leave_out_trained(read(data, model.metadata["column_types"]), model.metadata, read)
        absolute = {"path": dataset.source} if "path" in data else {}  # for a process that works in another folder
        return Champion(name, number, model, learner, {**data, **absolute}, dataset)
    dataset = read.recorded(model.metadata, f"version {number} of {name}")
    dataset = leave_out_trained(dataset, model.metadata, read)
    return Champion(name, number, model, learner, model.metadata["data"], dataset)


def choose_for(champion: Champion, labelled: Labelled, settings: Mapping[str, Any]) -> Choice:
    """Which labels a retraining of the champion takes under the `settings` of conf/retrain."""
    how = {"init": settings["init"], "new_classes": settings["new_classes"], **limits_for(champion, settings)}
    return choose(labelled, champion.dataset, classes=champion.learner.classes, **how)


def count_new(champion: Champion, labelled: Labelled, settings: Mapping[str, Any]) -> int:
    """How many labels that no training used yet a retraining would take now."""
    classes = None if settings["new_classes"] == "scratch" else champion.learner.classes
    left = select(labelled, champion.dataset, classes=classes, **limits_for(champion, settings))
    return int(((left == TAKEN) & (labelled.about["state"] == "accepted").to_numpy()).sum())


def limits_for(champion: Champion, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The limits of `select` for a retraining of the champion under the `settings` of conf/retrain."""
    return {
        "max_labels_per_annotator": most_labels(champion.dataset, settings),
        "max_range_factor": settings["max_range_factor"],
        "rejected": [] if settings["replay_rejected"] else registry.rejected_versions(champion.name),
    }
