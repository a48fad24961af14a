"""monitor: look at a window of stored predictions, decide whether to retrain, give the reason, and start retrain on request.

    mlflow run . -e monitor --env-manager local -P registered_model_name=alacarte
    python -m steps.monitor monitor.every=60 monitor.act=true

Result: one run for each window, with drift and quality metrics, plots, report.html and decision.json. Exit code 3 means yes,
0 means no. With monitor.act=true and a yes, the exit code is the exit code of the retraining.
"""

import tempfile
import time
from dataclasses import asdict

import mlflow
from omegaconf import DictConfig

from alacarte import launch, registry, tracking
from alacarte.errors import StoreError, UserError
from alacarte.evaluation.metrics import load_metrics
from alacarte.feedback import Store
from alacarte.monitoring.drift import Decision
from alacarte.monitoring.report import log_report
from alacarte.monitoring.window import check_settings, compare_window
from alacarte.processes import Forks
from alacarte.retraining.champion import count_new, load_champion

YES = 3  # exit code


@launch.step("monitor", run=False)  # each window is a run of its own
def main(cfg: DictConfig, forks: Forks) -> None:
    settings, name = launch.plain(cfg.monitor), cfg.registered_model_name
    check_settings(**settings)
    load_metrics(launch.plain(cfg.metrics))  # before the first window
    registry.check_name(name)
    if not name or not cfg.feedback.url:
        raise UserError(f"registered_model_name={name} feedback.url={cfg.feedback.url}: monitor needs both")
    store = Store(cfg.feedback.url)
    passing: tuple[type[Exception], ...] = (StoreError,)  # errors after which the loop continues
    while True:
        began = time.monotonic()
        try:
            decision, new_labels = judge_window(cfg, store)
            passing = StoreError, UserError  # the settings are right: the data or the champion have changed since
        except passing as error:
            if not settings["every"]:
                raise
            print("monitor:", *["the feedback store does not work:"] * isinstance(error, StoreError), error, flush=True)
            decision, new_labels = Decision(False, str(error)), 0
        code = act(cfg, forks, decision, new_labels) if decision.retrain and settings["act"] else YES * decision.retrain
        if not settings["every"]:
            raise SystemExit(code)
        time.sleep(max(0.0, settings["every"] - (time.monotonic() - began)))


def judge_window(cfg: DictConfig, store: Store) -> tuple[Decision, int]:
    """One window, one run: the decision, and the number of new labels that a retraining would use."""
    settings, name = launch.plain(cfg.monitor), cfg.registered_model_name
    champion = load_champion(name, launch.plain(cfg.data) if cfg.get("data") else None)
    now, model = time.time(), f"{name} version {champion.number}"
    window = store.window(name, now - settings["hours"] * 3600, now, settings["rows"])
    with tracking.start_run("monitor", cfg) as run:
        labelled, n = store.labelled(name, "accepted", "used"), len(window.about)
        new_labels = count_new(champion, labelled, launch.plain(cfg.retrain))
        if n < settings["min_rows"]:
            reason = f"{n} predictions in {settings['hours']} hours, and monitor.min_rows={settings['min_rows']}"
            decision = Decision(False, reason)
            mlflow.log_metrics({"rows": n, "new_labels": new_labels})
        else:
            own_metrics = load_metrics(launch.plain(cfg.metrics))
            comparison = compare_window(champion, window, labelled, new_labels, settings, own_metrics)
            decision = comparison.decision
            log_report(comparison, model, champion.dataset.target)
        answer = "yes" if decision.retrain else "no"
        mlflow.log_dict(asdict(decision), "decision.json")
        mlflow.set_tags({"retrain": answer, "reason": decision.reason, "model_version": champion.number})
        summary = {"model": model, "rows": f"{n:,} predictions, {new_labels:,} new labels"}
        summary["retrain"] = f"{answer}, {decision.reason}"
        if decision.retrain:  # the address of another store may contain a password
            store_key = [f"feedback.url={cfg.feedback.url}"] if cfg.feedback.url.startswith("sqlite") else []
            summary["next"] = tracking.step_command("retrain", f"registered_model_name={name}", *store_key)
        tracking.print_summary("monitor", summary)
        print(f"run_id={run.info.run_id}", flush=True)
        return decision, new_labels


def act(cfg: DictConfig, forks: Forks, decision: Decision, new_labels: int) -> int:
    """Start retrain and wait for it; its exit code. Two retrainings exclude each other by a lock in the store."""
    min_labels = min(cfg.monitor.labels, cfg.monitor.labels_with_drift)
    if new_labels < min_labels:
        print(f"monitor: not retrained, {new_labels} new labels of {min_labels}: label audit rows", flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        arguments = launch.save_for(launch.part_of(cfg, "retrain", reason=f"monitor: {decision.reason}"), folder)
        return forks.run("steps.retrain", arguments, {"MLFLOW_RUN_ID": None})


if __name__ == "__main__":
    with Forks() as forks:  # before MLflow opens a connection, which a fork must not share
        main(forks)
