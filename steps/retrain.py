"""retrain: train on from the champion with what people said since, then evaluate.

    mlflow run . -e retrain --env-manager local -P registered_model_name=alacarte
    python -m steps.retrain retrain.init=scratch gate.strict=true

Leaves behind a run with the model, its parent version and the exact labels; a version with alias `challenger`, these
labels marked as used by it, and what evaluate leaves behind. Hands on the run id, or says "nothing to do".
"""

import mlflow
import numpy as np
from omegaconf import DictConfig

from alacarte import launch, learners, registry, tracking
from alacarte.data.dataset import as_mlflow
from alacarte.errors import UserError
from alacarte.evaluation.gate import check_gate
from alacarte.evaluation.metrics import score_parts
from alacarte.feedback import Store
from alacarte.feedback.locks import Lease, claim, give_back, lock, use
from alacarte.processes import Forks
from alacarte.retraining import recovery
from alacarte.retraining.champion import load_champion
from alacarte.retraining.selection import check_settings, choose, givers, has_new, make_rows, take


@launch.step("retrain", run=False)  # where there is nothing to do, there is no run
def main(cfg: DictConfig) -> None:
    name = cfg.registered_model_name
    check_gate(**launch.plain(cfg.gate))
    check_settings(**launch.plain(cfg.retrain), inits=learners.INITS)
    registry.check_name(name)
    if not name or not cfg.feedback.url:
        raise UserError(f"registered_model_name={name} feedback.url={cfg.feedback.url}: retrain needs both")
    with lock(Store(cfg.feedback.url), name) as lease:
        if isinstance(lease, str):
            print(f"retrain: nothing to do, {lease} retrains {name} now")
            return
        if run_id := recovery.recover(lease, name) or train_on(cfg, lease):
            evaluate_cfg = launch.part_of(cfg, "evaluate", run_id=run_id, model_uri=None, data=None)
            forks.run_step("evaluate", evaluate_cfg, mlflow.get_run(run_id))
            print(f"run_id={run_id}")


def train_on(cfg: DictConfig, lease: Lease) -> str | None:
    """Train, register the version and mark its labels used; the run id, None where too few labels are new."""
    name, settings = cfg.registered_model_name, launch.plain(cfg.retrain)
    labelled = lease.store.labelled(name, "accepted", "used")
    if not has_new(labelled):
        return print(f"retrain: nothing to do, {name} has no new label to learn from")
    champion = load_champion(name, launch.plain(cfg.data) if cfg.get("data") else None)
    learner, dataset, number = champion.learner, champion.dataset, champion.number
    rejected = [] if settings["replay_rejected"] else registry.rejected_versions(name)
    choice = choose(
        labelled, dataset, classes=learner.classes, rejected=rejected,
        **{key: settings[key] for key in ("init", "new_classes", "giver_share", "reach")},
    )  # fmt: skip
    if len(choice.new) < settings["least_labels"]:
        due = f"{len(choice.new)} new labels of retrain.least_labels={settings['least_labels']}"
        return print(f"retrain: nothing to do, {due}; left out: {choice.why_left_out}")

    ids = labelled.about["feedback_id"].to_numpy()
    with tracking.start_run("retrain", cfg) as run:
        claimed = claim(lease, ids[choice.new].tolist(), run.info.run_id)
        new = choice.new[np.isin(ids[choice.new], claimed)]  # a label may just have been rejected
        taken = take(labelled, np.concatenate([choice.replayed, new]))
        amounts = {key: settings[key] for key in ("replay_limit", "label_repeats")}
        rows = make_rows(dataset, taken, champion.data["split"], **amounts, seed=cfg.seed)
        print(f"retrain: from version {number} on {rows.n_replayed} rows of {dataset.name} and {len(new)} new labels")
        mlflow.log_input(as_mlflow(dataset, "train"), context="replay")
        update = learner.update(
            *rows.train, *rows.val, init=choice.init, share=settings["budget"], shrink=settings["shrink"], seed=cfg.seed,
            on_epoch=lambda epoch, metrics: mlflow.log_metrics(metrics, step=epoch),
        )  # fmt: skip
        print(f"retrain: {update.init}, {update.epochs} epochs" + (f", {update.note}" if update.note else ""))
        mlflow.set_tags({"reason": cfg.reason, "parent_version": number, "init": update.init})
        report = {"new": sorted(claimed), "replayed": ids[choice.replayed].tolist(), "left_out": choice.left_out}
        mlflow.log_dict(report | {"givers": givers(taken).value_counts().to_dict()}, "feedback.json")
        heritage = champion.heritage(run.info.run_id)
        info = learner.log("model", example=dataset.part("train")[0].head(5), metadata=heritage)
        metrics = score_parts(learner, {"train": rows.train, "val": rows.val})
        metrics |= {"sample_visits": update.visits, "epochs": update.epochs, "new_labels": len(new)}
        mlflow.log_metrics(metrics, model_id=info.model_id)

        if cfg.gate.dry_run:
            give_back(lease, run.info.run_id)
            return run.info.run_id
        registry.check_champion(name, number)
        tags = {registry.RUN_TAG: run.info.run_id, "parent_version": number, "new_labels": len(new)}
        version = registry.number_of(registry.register(name, info.model_uri, tags))
        use(lease, run.info.run_id, version)
        mlflow.set_tag("model_version", version)
        return run.info.run_id


if __name__ == "__main__":
    with Forks() as forks:  # before MLflow opens a connection, which a fork must not share
        main()
