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
from alacarte.evaluation.audit import ONE_PARTY, subset
from alacarte.evaluation.gate import check_gate, check_metric
from alacarte.evaluation.metrics import load_metrics, score_parts
from alacarte.feedback import Store
from alacarte.feedback.locks import Lock, claim, give_back, lock
from alacarte.feedback.queries import Labelled
from alacarte.processes import Forks
from alacarte.retraining.champion import Champion, choose_for, load_champion
from alacarte.retraining.recovery import recover, register_version
from alacarte.retraining.selection import Choice, check_settings, has_new, make_rows


@launch.step("retrain", run=False)  # where there is nothing to do, there is no run
def main(cfg: DictConfig, forks: Forks) -> None:
    name = cfg.registered_model_name
    check_gate(**launch.plain(cfg.gate), metrics=load_metrics(launch.plain(cfg.metrics)))
    check_settings(**launch.plain(cfg.retrain), inits=learners.INITS)
    if not name or not cfg.feedback.url:
        raise UserError(f"registered_model_name={name} feedback.url={cfg.feedback.url}: retrain needs both")
    check_metric(cfg.gate.metric, registry.require_champion(name).tags)
    with lock(Store(cfg.feedback.url), name) as model_lock:
        if model_lock is None:
            print(f"retrain: nothing to do, another process retrains {name} now")
            return
        unjudged = recover(model_lock, name)  # the run of a version without a verdict, from a call that was killed
        run_id, notes = (unjudged, []) if unjudged else retrain(cfg, model_lock)
        if run_id:
            evaluate_cfg = launch.part_of(cfg, "evaluate", run_id=run_id, model_uri=None)
            forks.run_step("evaluate", evaluate_cfg, mlflow.get_run(run_id))
    print(*(f"retrain: {note}" for note in notes), *([f"run_id={run_id}"] if run_id else []), sep="\n")


def retrain(cfg: DictConfig, model_lock: Lock) -> tuple[str | None, list[str]]:
    """Load, select, train, register: the run id, None if too few labels are new, and notes for the user."""
    name, settings = cfg.registered_model_name, launch.plain(cfg.retrain)
    labelled = model_lock.store.labelled(name, "accepted", "used")
    if not has_new(labelled):
        return None, [f"nothing to do, {name} has no new label to learn from"]
    champion = load_champion(name, launch.plain(cfg.data) if cfg.get("data") else None)
    choice = choose_for(champion, labelled, settings)
    notes = choice.notes(champion.dataset, settings)
    if len(choice.new) < settings["min_labels"]:
        count = f"{len(choice.new)} new labels of retrain.min_labels={settings['min_labels']}"
        return None, [f"nothing to do, {count}; left out: {choice.why_left_out}", *notes]
    with tracking.start_run("retrain", cfg) as run:
        run_id = run.info.run_id
        ids = labelled.about["feedback_id"].to_numpy()
        claimed = claim(model_lock, ids[choice.new].tolist(), run_id)
        new = choice.new[np.isin(ids[choice.new], claimed)]  # an administrator may just have rejected a label
        mlflow.log_dict(choice.record(labelled, new), "feedback.json")
        model_uri = train(cfg, run_id, champion, choice, labelled, new)
        if cfg.gate.dry_run:
            give_back(model_lock, run_id)
        else:
            register_version(model_lock, run_id, champion, model_uri, n_new=len(new))
    return run_id, [note for note in notes if note != ONE_PARTY]  # evaluate says this one


def train(cfg: DictConfig, run_id: str, champion: Champion, choice: Choice, labelled: Labelled, new: np.ndarray) -> str:
    """Train the champion's learner further with the chosen labels, and log it; the URI of the model."""
    settings, learner, dataset = launch.plain(cfg.retrain), champion.learner, champion.dataset
    chosen = subset(labelled, np.concatenate([choice.replayed, new]))
    amounts = {key: settings[key] for key in ("max_replay_rows", "label_weight")}
    rows = make_rows(dataset, chosen, champion.data["split"], **amounts, seed=cfg.seed)
    from_version = f"from version {champion.number} on {rows.n_replayed} rows of {dataset.name}"
    print(f"retrain: {from_version} and {len(new)} new labels")
    mlflow.log_input(as_mlflow(dataset, "train"), context="replay")
    how = {"init": choice.init, "share": settings["epoch_fraction"], "shrink": settings["shrink"], "seed": cfg.seed}
    how["on_epoch"] = lambda epoch, metrics: mlflow.log_metrics(metrics, step=epoch)
    update = learner.update(*rows.train, *rows.val, **how, weight=rows.weight, val_weight=rows.val_weight)
    print(f"retrain: {update.init}, {update.epochs} epochs" + (f", {update.note}" if update.note else ""))
    mlflow.set_tags({"reason": cfg.reason, "parent_version": champion.number, "init": update.init})
    example = dataset.part("train")[0].head(5)
    info = learner.log("model", example=example, metadata=champion.lineage_metadata(run_id, update.init))
    parts = {"train": (*rows.train, rows.weight), "val": (*rows.val, rows.val_weight)}
    metrics = score_parts(learner, parts, load_metrics(launch.plain(cfg.metrics)))
    metrics |= {"samples_seen": update.samples_seen, "epochs": update.epochs, "new_labels": len(new)}
    mlflow.log_metrics(metrics, model_id=info.model_id)
    return info.model_uri


if __name__ == "__main__":
    with Forks() as forks:  # before MLflow opens a connection, which a fork must not share
        main(forks)
