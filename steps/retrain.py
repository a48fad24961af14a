"""retrain: train the champion further with the labels that came since, then evaluate.

    mlflow run . -e retrain --env-manager local -P registered_model_name=alacarte
    python -m steps.retrain retrain.init=scratch gate.strict=true

Result: a run with the model, its parent version and the exact labels; a version with the alias `challenger`; these labels
marked as used by the version; and the results of evaluate. Prints the run id, or "nothing to do".
"""

import mlflow
import numpy as np
from omegaconf import DictConfig

from alacarte import launch, learners, registry, tracking
from alacarte.data.dataset import as_mlflow
from alacarte.errors import UserError
from alacarte.evaluation.audit import subset
from alacarte.evaluation.gate import check_gate
from alacarte.evaluation.metrics import score_parts
from alacarte.feedback import Store
from alacarte.feedback.locks import Lock, claim, give_back, lock, use
from alacarte.feedback.queries import Labelled
from alacarte.processes import Forks
from alacarte.retraining import recovery
from alacarte.retraining.champion import Champion, choose_for, load_champion
from alacarte.retraining.selection import Choice, check_settings, has_new, make_rows


@launch.step("retrain", run=False)  # where there is nothing to do, there is no run
def main(cfg: DictConfig, forks: Forks) -> None:
    name = cfg.registered_model_name
    check_gate(**launch.plain(cfg.gate))
    check_settings(**launch.plain(cfg.retrain), inits=learners.INITS)
    if not name or not cfg.feedback.url:
        raise UserError(f"registered_model_name={name} feedback.url={cfg.feedback.url}: retrain needs both")
    registry.require_champion(name)
    with lock(Store(cfg.feedback.url), name) as model_lock:
        if model_lock is None:
            print(f"retrain: nothing to do, another process retrains {name} now")
            return
        waiting = recovery.recover(
            model_lock, name
        )  # the run of a version of an earlier call, which has no verdict yet
        run_id, notes = (waiting, []) if waiting else retrain(cfg, model_lock)
        if run_id:
            evaluate_cfg = launch.part_of(cfg, "evaluate", run_id=run_id, model_uri=None)
            forks.run_step("evaluate", evaluate_cfg, mlflow.get_run(run_id))
    print(*(f"retrain: {note}" for note in notes), *([f"run_id={run_id}"] if run_id else []), sep="\n")


def retrain(cfg: DictConfig, model_lock: Lock) -> tuple[str | None, list[str]]:
    """Choose the labels and train with them: the run id, None where too few labels are new, and notes for the user."""
    name, settings = cfg.registered_model_name, launch.plain(cfg.retrain)
    labelled = model_lock.store.labelled(name, "accepted", "used")
    if not has_new(labelled):
        return None, [f"nothing to do, {name} has no new label to learn from"]
    champion = load_champion(name, launch.plain(cfg.data) if cfg.get("data") else None)
    choice = choose_for(champion, labelled, settings)
    notes = choice.notes(champion.dataset, settings["max_share_per_annotator"])
    if len(choice.new) < settings["min_labels"]:
        count = f"{len(choice.new)} new labels of retrain.min_labels={settings['min_labels']}"
        return None, [f"nothing to do, {count}; left out: {choice.why_left_out}", *notes]
    return train(cfg, model_lock, champion, labelled, choice), notes


def train(cfg: DictConfig, model_lock: Lock, champion: Champion, labelled: Labelled, choice: Choice) -> str:
    """Train, register the version and mark its labels as used; the run id."""
    settings, learner, dataset, number = launch.plain(cfg.retrain), champion.learner, champion.dataset, champion.number
    ids = labelled.about["feedback_id"].to_numpy()
    with tracking.start_run("retrain", cfg) as run:
        run_id = run.info.run_id
        claimed = claim(model_lock, ids[choice.new].tolist(), run_id)
        new = choice.new[np.isin(ids[choice.new], claimed)]  # a label may just have been rejected
        taken = subset(labelled, np.concatenate([choice.replayed, new]))
        amounts = {key: settings[key] for key in ("max_replay_rows", "label_weight")}
        rows = make_rows(dataset, taken, champion.data["split"], **amounts, seed=cfg.seed)
        print(f"retrain: from version {number} on {rows.n_replayed} rows of {dataset.name} and {len(new)} new labels")
        mlflow.log_input(as_mlflow(dataset, "train"), context="replay")
        how = {"init": choice.init, "share": settings["epoch_fraction"], "shrink": settings["shrink"], "seed": cfg.seed}
        update = learner.update(*rows.train, *rows.val, **how, weight=rows.weight, on_epoch=tracking.log_epoch)
        print(f"retrain: {update.init}, {update.epochs} epochs" + (f", {update.note}" if update.note else ""))
        mlflow.set_tags({"reason": cfg.reason, "parent_version": number, "init": update.init})
        mlflow.log_dict(choice.record(labelled, new), "feedback.json")
        example = dataset.part("train")[0].head(5)
        info = learner.log("model", example=example, metadata=champion.lineage_metadata(run_id))
        metrics = score_parts(learner, {"train": rows.train, "val": rows.val})
        metrics |= {"samples_seen": update.samples_seen, "epochs": update.epochs, "new_labels": len(new)}
        mlflow.log_metrics(metrics, model_id=info.model_id)
        if cfg.gate.dry_run:
            give_back(model_lock, run_id)
            return run_id
        registry.check_champion(champion.name, number)
        tags = {registry.RUN_TAG: run_id, "parent_version": number, "new_labels": len(new)}
        version = registry.number_of(registry.register(champion.name, info.model_uri, tags))
        use(model_lock, run_id, version)
        mlflow.set_tag("model_version", version)
        return run_id


if __name__ == "__main__":
    with Forks() as forks:  # before MLflow opens a connection, which a fork must not share
        main(forks)
