"""main: run train and evaluate as child runs of one run, and skip a step that ran before without a change since.

    mlflow run . --env-manager local
    python -m steps.pipeline model=torch_mlp reuse=false

Result: the parent run and the results of its steps. Prints the run ids, the model version and the verdict.
"""

from urllib.parse import quote

import mlflow
from mlflow.entities import Run
from omegaconf import DictConfig

from alacarte import launch, registry, tracking
from alacarte.evaluation.gate import check_gate, check_metric
from alacarte.evaluation.metrics import load_metrics
from alacarte.processes import Forks

# What both steps need, loaded once. torch is not here: a step that needs it imports it.
PRELOAD = [
    "mlflow.sklearn",
    "alacarte.data.dataset",
    "alacarte.evaluation.metrics",
    "alacarte.learners.sklearn",
    "alacarte.formats:skops_io",
]


def find_run(step: str, cfg: DictConfig, reuse: bool) -> Run | None:
    """The finished run that makes this step unnecessary, if there is one and reuse is on."""
    run = tracking.find_finished(tracking.active_run().info.experiment_id, step, cfg) if reuse else None
    if run:
        print(f"{step}: reused run {run.info.run_id}, with the same configuration, source, data and upstream")
    return run


def show(evaluated: Run, name: str | None) -> None:
    """The last lines: the results of both steps, the next command, and where to look."""
    tags, is_registered = evaluated.data.tags, evaluated.data.tags["model_version"] != "none"
    page = f"experiments/{evaluated.info.experiment_id}"
    if is_registered:
        page = f"models/{quote(str(name))}/versions/{tags['model_version']}"
    summary = {
        "run": tracking.active_run().info.run_id,
        "model": f"{name} version {tags['model_version']}" if is_registered else "not registered",
        "metrics": f"test {tracking.describe_metrics(evaluated.data.metrics, 'test_')}",
        "verdict": f"{tags['gate.verdict']}, {tags['gate.reason']}",
        "champion": f"version {tags['champion_after']}",
        "open": tracking.how_to_look("/#/" + page),
    }
    if tags["champion_after"] != "none":
        summary["next"] = tracking.step_command("serve", f"registered_model_name={name}")
    tracking.print_summary("main", summary)


@launch.step("main")
def main(cfg: DictConfig, forks: Forks) -> None:
    check_gate(**launch.plain(cfg.gate), metrics=load_metrics(launch.plain(cfg.metrics)))  # before hours of training
    registry.check_name(cfg.registered_model_name)
    champion = registry.champion_of(cfg.registered_model_name) if cfg.registered_model_name else None
    check_metric(cfg.gate.metric, champion.tags if champion else {})
    train_cfg = launch.part_of(cfg, "train")
    # A reused run would not write the folder of save_to.
    trained = find_run("train", train_cfg, cfg.reuse and not cfg.save_to)
    if trained and not registry.has_files(tracking.logged_model_uri(trained)):
        print("train: the model of this run has been deleted since, so it runs again")
        trained = None
    trained = trained or forks.run_step("train", train_cfg, tracking.active_run(), PRELOAD)
    mlflow.set_tag("train_run_id", trained.info.run_id)

    evaluate_cfg = launch.part_of(cfg, "evaluate", run_id=trained.info.run_id, model_uri=None)
    # A verdict is valid as long as the champion is the one that it left behind, and no label can have come.
    evaluated = find_run("evaluate", evaluate_cfg, cfg.reuse and not cfg.get("feedback"))
    if evaluated and not registry.is_current(cfg.registered_model_name, evaluated.data.tags):
        print("evaluate: the champion has changed since, or its files are gone, so it runs again")
        evaluated = None
    evaluated = evaluated or forks.run_step("evaluate", evaluate_cfg, tracking.active_run(), PRELOAD)
    mlflow.set_tag("evaluate_run_id", evaluated.info.run_id)
    mlflow.log_metrics({name: value for name, value in evaluated.data.metrics.items() if name.startswith("test_")})
    show(evaluated, cfg.registered_model_name)


if __name__ == "__main__":
    if mlflow.get_tracking_uri().startswith("sqlite"):  # what opens the store, loaded once and not by every step again
        import mlflow.store.model_registry.sqlalchemy_store
        import mlflow.store.tracking.sqlalchemy_store
    with Forks() as forks:  # before MLflow opens a connection, which a fork must not share
        main(forks)
