"""MLflow runs: open and close them, pass run ids between steps, and reuse identical finished runs."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, Param, Run, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_USER,
)
from omegaconf import DictConfig, OmegaConf

from alacarte import signals, stores
from alacarte.errors import UserError, first_line
from alacarte.source import git_tags, source_hash, source_of

LONGEST_PARAM = 6000  # characters; MLflow cuts what is longer
NOT_IDENTITY = {"description", "experiment_name", "reuse"}  # keys that change nothing a step computes

# The last line that a step prints is an argument of the next one, so MLflow's own lines about a run stay away.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

logger = logging.getLogger(__name__)
if "MLFLOW_LOGGING_LEVEL" not in os.environ:  # its INFO lines repeat what the steps print
    logging.getLogger("mlflow").setLevel(logging.WARNING)


# --- opening and closing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def start_run(step: str, cfg: DictConfig | None) -> Iterator[Run]:
    """Resume the run of `mlflow run` or of the pipeline, or open one, and record its configuration and source.

    Sets the tags `step`, `fingerprint`, `config_hash` and git's commit, the configuration as params and as
    `config.yaml`. The run ends FINISHED, FAILED after an exception, KILLED after SIGTERM or Ctrl-C.
    """
    experiment = cfg.get("experiment_name") if cfg is not None else None
    if os.environ.get("MLFLOW_RUN_ID"):
        if experiment:
            logger.warning("experiment_name=%s is ignored: this run is in the experiment that started it", experiment)
    elif mlflow.active_run() is None:
        stores.use_experiment(experiment)
    name = None if os.environ.get("MLFLOW_RUN_ID") else step  # else it has one
    source = source_of(step, None if cfg is None else OmegaConf.to_container(cfg, resolve=True))
    tags = {"step": step, **git_tags(source.values()), **({} if cfg is None else _identity(step, cfg))}
    status = "FAILED"
    run = mlflow.start_run(nested=mlflow.active_run() is not None, run_name=name, tags=tags)
    try:
        if "-sweep" in step:
            mlflow.set_tag(MLFLOW_RUN_NAME, step)
        if cfg is not None:
            log_config(run, cfg)
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code or 0
        status = "FINISHED" if code == 0 else "KILLED" if code in (130, 143) else "FAILED"
        raise
    finally:  # without one of these exceptions too: a library may replace it
        mlflow.end_run("KILLED" if signals.arrived and status == "FAILED" else status)


def active_run() -> Run:
    """The run of the current step."""
    run = mlflow.active_run()
    assert run is not None, "a step runs inside launch.step, which opens its run"
    return run


def fail(run_id: str | None) -> None:
    """Mark a run FAILED that its step never opened, so that it does not stay RUNNING."""
    if not run_id:
        return
    with contextlib.suppress(MlflowException, UserError):
        stores.open_stores()  # a store that does not work costs seconds here too
        client = MlflowClient()
        if not RunStatus.is_terminated(RunStatus.from_string(client.get_run(run_id).info.status)):
            client.set_terminated(run_id, "FAILED")


def create_child(step: str, cfg: DictConfig, parent: Run) -> str:
    """Create the run that a step started with MLFLOW_RUN_ID will resume, as `mlflow run` does; return its id."""
    inherited = {key: value for key, value in parent.data.tags.items() if key in (MLFLOW_USER, MLFLOW_SOURCE_NAME)}
    tags = {**inherited, MLFLOW_PARENT_RUN_ID: parent.info.run_id, "step": step, **_identity(step, cfg)}
    return MlflowClient().create_run(parent.info.experiment_id, run_name=step, tags=tags).info.run_id


def log_model_input(model_id: str | None) -> None:
    """Record that the active run uses a logged model of this server."""
    if model_id:
        with contextlib.suppress(MlflowException):  # a copied model keeps its id from another server
            MlflowClient().log_inputs(active_run().info.run_id, models=[LoggedModelInput(model_id)])


def environment(run_id: str, parent: Run) -> dict[str, str]:
    """The environment variables with which `mlflow run` names the run that a step resumes."""
    return {
        "MLFLOW_RUN_ID": run_id,
        "MLFLOW_EXPERIMENT_ID": parent.info.experiment_id,
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
    }


def log_config(run: Run, cfg: DictConfig) -> None:
    """Log the resolved configuration as `config.yaml`, and as flat params.

    A param that `mlflow run` logged, as typed, stays: params cannot change. A value that MLflow would cut is replaced by
    its start and its length.
    """
    mlflow.log_text(OmegaConf.to_yaml(cfg, resolve=True), "config.yaml")
    if cfg.get("description"):
        mlflow.set_tag(MLFLOW_RUN_NOTE, cfg.description)
    client, run_id = MlflowClient(), run.info.run_id
    logged = client.get_run(run_id).data.params
    params = [Param(key, value) for key, value in flatten(cfg).items() if key not in logged]
    client.log_batch(run_id, params=params)


def flatten(cfg: DictConfig) -> dict[str, str]:
    """`{"model.lr": "0.1", "model.hidden": "[64, 32]"}`: values spelled as one would type them, keys as MLflow allows."""
    flat: dict[str, str] = {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                visit(value, f"{path}.{key}" if path else str(key))
            return
        value = node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
        if len(value) > LONGEST_PARAM:
            value = f"{value[:200]}... ({len(value)} characters, whole in config.yaml)"
        flat[re.sub(r"[^\w\-. :/]", "_", path)[:250]] = value

    visit(OmegaConf.to_container(cfg, resolve=True), "")
    return flat


# --- identity: what makes two runs the same --------------------------------------------------------------------------


def _identity(step: str, cfg: DictConfig) -> dict[str, str]:
    about = {"source_run_id": cfg.get("run_id"), "registered_model_name": cfg.get("registered_model_name")}
    about |= {"config_hash": config_hash(cfg), "fingerprint": fingerprint(step, cfg)}
    return {key: value for key, value in about.items() if value}


def config_hash(cfg: DictConfig) -> str:
    """SHA-256 of `config.yaml`."""
    return hashlib.sha256(OmegaConf.to_yaml(cfg, resolve=True).encode()).hexdigest()


def fingerprint(step: str, cfg: DictConfig) -> str:
    """One hash of everything that decides a step's result: configuration with the upstream run id, source, data."""
    from alacarte.data.dataset import source_digest

    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    parts = {key: value for key, value in container.items() if key not in NOT_IDENTITY}
    data = source_digest(**container["data"]) if container.get("data") else None
    text = json.dumps([step, parts, source_hash(step, container), data], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def find_finished(experiment_id: str, step: str, cfg: DictConfig) -> Run | None:
    """The newest FINISHED run of a step with the same fingerprint, or None."""
    mark = fingerprint(step, cfg)
    runs = MlflowClient().search_runs(
        [experiment_id],
        filter_string=f"attributes.status = 'FINISHED' and tags.step = '{step}' and tags.fingerprint = '{mark}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return runs[0] if runs else None


# --- run ids as hand-off ---------------------------------------------------------------------------------------------


def require_run(run_id: str, steps: tuple[str, ...]) -> Run:
    """The FINISHED run of one of `steps` with this id; UserError for any other run."""
    allowed = " or ".join(steps)
    try:
        run = MlflowClient().get_run(run_id)
    except MlflowException as error:
        raise UserError(f"run_id={run_id} does not exist on {mlflow.get_tracking_uri()}: {first_line(error)}") from None
    kind = run.data.tags.get("step")
    if kind not in steps:
        raise UserError(f"run_id={run_id} is a run of {kind or 'something else'}: give the id of a {allowed} run")
    if run.info.status != "FINISHED" or run.info.lifecycle_stage != "active":
        state = run.info.status if run.info.lifecycle_stage == "active" else "deleted"
        raise UserError(f"run_id={run_id} is {state}: give the id of a {allowed} run that FINISHED")
    return run


def logged_model_uri(run: Run) -> str:
    """`models:/m-...` of the model that a run logged; UserError when it logged none."""
    outputs = run.outputs.model_outputs if run.outputs else []
    if not outputs:
        raise UserError(f"run_id={run.info.run_id} has no logged model: give the id of a run that logged one")
    return f"models:/{outputs[-1].model_id}"


def model_uri_of(run_id: str | None, model_uri: str | None) -> str:
    """The model that `run_id` or `model_uri` asks for; UserError unless exactly one of them is given."""
    if bool(run_id) == bool(model_uri):
        raise UserError(
            f"run_id={run_id or 'null'} and model_uri={model_uri or 'null'}: give exactly one, such as -P run_id=ID"
        )
    return logged_model_uri(require_run(run_id, ("train", "retrain"))) if run_id else str(model_uri)


def print_summary(step: str, rows: Mapping[str, object]) -> None:
    """Print the results of a step as a small table: its last lines, before the argument of the next step."""
    for name, value in rows.items():
        print(f"{step}: {name:9} {value}")


def describe_metrics(metrics: Mapping[str, float], start: str = "") -> str:
    """The metrics whose names start with `start`, as text without this start."""
    named = {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}
    return ", ".join(f"{name} {value:.4f}" for name, value in named.items())


def step_command(step: str, *arguments: str) -> str:
    """The command of a step, as one types it in this folder."""
    program = stores.program("python") + " -m steps." if Path("steps").is_dir() else stores.program("alacarte") + " "
    return " ".join([program + step, *map(shlex.quote, arguments)])


def how_to_look(page: str) -> str:
    """The command, or the address, that opens the MLflow UI on a page such as `/#/models/alacarte/versions/1`."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        return f"open {uri.rstrip('/')}{page}"
    if uri.startswith("databricks"):
        return "open the workspace's Experiments and Models pages"
    store = "" if uri == f"sqlite:///{Path('mlflow.db').resolve()}" else f" --backend-store-uri {shlex.quote(uri)}"
    return f"{stores.program('mlflow')} ui{store}   then open http://127.0.0.1:5000{page}"
