"""Register a version, and clean up after a retraining that was killed before or after that."""

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from alacarte import registry, tracking
from alacarte.feedback.locks import Lock, claims, give_back, use
from alacarte.registry import RUN_TAG
from alacarte.retraining.champion import Champion


def recover(model_lock: Lock, name: str) -> str | None:
    """Resolve claims and end runs of killed calls; the run id of a version that has no verdict yet. It needs the lock."""
    for run_id in claims(model_lock.store, name):
        version = version_of(name, run_id)
        if version is None:
            give_back(model_lock, run_id)
        else:
            registry.register(name, str(version.source))  # it may have been stopped before the alias
            use(model_lock, run_id, registry.number_of(version))
    for run in _running(f"tags.step = 'retrain' and tags.registered_model_name = '{name}'"):
        tracking.fail(run)
    waiting = registry.by_alias(name, registry.CHALLENGER)
    if waiting is None or RUN_TAG not in waiting.tags or not _is_open(name, waiting):
        return None
    run_id, used = waiting.tags[RUN_TAG], model_lock.store.labelled(name, "used").about
    # Anybody who may write to the registry can set the tag. The store says which run made the version.
    if run_id not in set(used.loc[used["used_version"] == registry.number_of(waiting), "used_run_id"]):
        return None
    for run in _running(f"tags.step = 'evaluate' and tags.source_run_id = '{run_id}'"):
        tracking.fail(run)
    client = MlflowClient()
    if client.get_run(run_id).info.status != "FINISHED":  # it was stopped after its version was registered
        client.set_terminated(run_id, "FINISHED")
    return run_id


def register_version(model_lock: Lock, run_id: str, champion: Champion, model_uri: str, n_new: int) -> None:
    """Register the model of a run, and mark the labels of the run as used by the new version."""
    registry.check_champion(champion.name, champion.number)
    tags = {RUN_TAG: run_id, "parent_version": champion.number, "new_labels": n_new}
    version = registry.number_of(registry.register(champion.name, model_uri, tags))
    use(model_lock, run_id, version)
    mlflow.set_tag("model_version", version)


def version_of(name: str, run_id: str) -> ModelVersion | None:
    """The version that a retraining registered, if it came that far."""
    return next((version for version in registry.versions_of(name) if version.tags.get(RUN_TAG) == run_id), None)


def _is_open(name: str, version: ModelVersion) -> bool:
    """Whether a version has no verdict yet, or one to be promoted that did not come to it."""
    verdict = version.tags.get("gate.verdict")
    if verdict == "PROMOTE" and "promoted_at" not in version.tags:
        return registry.number_of(registry.champion_of(name)) != registry.number_of(version)
    return verdict is None


def _running(condition: str) -> list[str]:
    runs = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"attributes.status = 'RUNNING' and {condition}",
        output_format="list",
    )
    return [run.info.run_id for run in runs]
