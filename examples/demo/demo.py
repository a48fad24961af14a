"""demo: run the whole loop with simulated users: serve, report errors, monitor, retrain, promote, change the version.

    mlflow run . -e demo --env-manager local
    python -m examples.demo.demo demo.degrees=15 demo.per_second=60

Result: a run with demo.png (the accuracy over the requests, and the versions), the accuracies and the failed requests. train,
serve, monitor, retrain and evaluate are processes of their own and have the results that they always have. Exit code 1 means:
a request failed, or no new version was promoted.
"""

import sys
import tempfile
import time
from functools import partial
from urllib.parse import quote

import mlflow
from mlflow.entities import Run
from omegaconf import DictConfig
from tqdm import tqdm

from alacarte import launch, registry, tracking
from alacarte.errors import UserError
from alacarte.processes import Forks
from examples.demo.child import start
from examples.demo.people import MARKS, WINDOW, Traffic, accuracy_figure
from project.data import load_digits

PROGRESS_SECONDS = 1 if sys.stderr.isatty() else 15  # between two updates of the progress bar


@launch.step("demo")
def main(cfg: DictConfig, forks: Forks) -> None:
    run, name = tracking.active_run(), cfg.registered_model_name
    registry.check_name(name)
    before = registry.champion_of(name) if name else None
    if not name or (before and "demo" not in registry.ancestry(before)[-1].tags):
        raise UserError(
            f"registered_model_name={name}: the demo moves the champion of this model, "
            "so give it a name of its own: registered_model_name=demo"
        )
    make_champion(name, registry.number_of(before), forks.run_step("train", launch.part_of(cfg, "train"), run))

    traffic = Traffic(cfg.data.target, cfg.demo.per_second, cfg.demo.reports, cfg.demo.people, cfg.seed)
    marks: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(unit=" requests", mininterval=PROGRESS_SECONDS) as bar:
        cfg.feedback.url = cfg.feedback.url or f"sqlite:///{folder}/feedback.db"

        def mark(line: str) -> None:
            if line.startswith(("monitor: retrain   yes", "retrain:", "evaluate:")):
                bar.write(line)
                marks.extend((len(traffic.answers), text) for start, text in MARKS.items() if line.startswith(start))

        def progress() -> None:
            bar.update()
            shown = {"version": traffic.version, "accuracy": traffic.accuracy(last=WINDOW), "labels": traffic.labels}
            bar.set_postfix(shown, refresh=False)

        with start("serve", launch.part_of(cfg, "serve"), run, mark) as server:
            traffic.url = server.wait_for("serve: http").split()[1]
            traffic.wait_until_ready()
            with start("monitor", launch.part_of(cfg, "monitor", data=None), run, mark) as monitor:
                later = load_digits(start=cfg.data.stop)
                traffic.send("other writers", later, lambda sent: sent == cfg.demo.requests, progress)
                turned = load_digits(rotate=cfg.demo.degrees).sample(frac=1, random_state=cfg.seed)
                since, end = len(monitor.lines), time.monotonic() + cfg.demo.patience
                promoted = partial(monitor.has_printed, "evaluate: verdict   PROMOTE", "run_id=", since=since)

                def follows(_: int) -> bool:  # a busy server takes a moment to load the new version
                    return (promoted() and traffic.version != traffic.answers[0].version) or time.monotonic() > end

                traffic.send("turned", turned[::2], follows, progress)
            traffic.send("turned, unseen", turned[1::2], lambda sent: sent == cfg.demo.requests, progress)
    show(cfg, traffic, marks)


def make_champion(name: str, before: str, trained: Run) -> None:
    """Register the model that was just trained, and make it the champion."""
    model_uri = registry.locate(tracking.logged_model_uri(trained)).uri
    version = registry.register(name, model_uri, {"demo": "true"})
    registry.promote(version, expected=before, reason="a demo starts")


def show(cfg: DictConfig, traffic: Traffic, marks: list[tuple[int, str]]) -> None:
    """Log the accuracies and the plot, and print the result."""
    first, last = traffic.answers[0].version, traffic.version
    metrics = {
        "accuracy_before": traffic.accuracy("other writers", first),
        "accuracy_turned": traffic.accuracy("turned", first),
        "accuracy_after": traffic.accuracy("turned, unseen"),
        "failed_requests": len(traffic.failures),
    }
    mlflow.log_metrics(metrics)
    mlflow.log_text("\n".join(traffic.failures), "failed_requests.txt")
    mlflow.log_figure(accuracy_figure(traffic.answers, marks, cfg.registered_model_name), "demo.png")
    accuracies = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items() if key.startswith("accuracy"))
    print(f"demo: {accuracies}; version {first} to {last}, {len(traffic.failures)} failed requests")
    for failure in traffic.failures[:1]:
        print(f"demo: the first failed request: {failure}")
    print(f"demo: {tracking.how_to_look('/#/models/' + quote(cfg.registered_model_name))}")
    raise SystemExit(bool(traffic.failures or first == last))


if __name__ == "__main__":
    with Forks() as forks:  # before MLflow opens a connection, which a fork must not share
        main(forks)
