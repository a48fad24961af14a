"""Run the entry points on Databricks: stage the project, submit a job, wait for it, and end with the exit code of the step.

    python -m alacarte.databricks stage
    python -m alacarte.databricks run train --experiment-name /Shared/alacarte model=torch_mlp

`mlflow run build/databricks -b databricks` submits the same job, but it does not wait for it. If something fails before the
step begins, its MLflow run stays RUNNING. Here this program closes the run, or its next call does.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.projects._project_spec import load_project
from mlflow.projects.databricks import DatabricksJobRunner
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATABRICKS_RUN_URL,
    MLFLOW_DATABRICKS_SHELL_JOB_RUN_ID,
    MLFLOW_PROJECT_BACKEND,
    MLFLOW_PROJECT_ENTRY_POINT,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from alacarte import launch, registry
from alacarte.databricks import stage
from alacarte.errors import UserError
from alacarte.source import git_tags

ENDED = ("TERMINATED", "SKIPPED", "INTERNAL_ERROR")
SUBMITTING = 600  # seconds after which a run without a job is nobody's
PATIENCE = 300  # seconds without an answer after which a job is left alone
LOST = (MlflowException, requests.exceptions.RequestException, OSError)
AGAIN = "python -m alacarte.databricks settle"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m alacarte.databricks", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("stage", "make build/databricks"),
        ("run", "stage, submit, wait; then KEY=VALUE and --KEY VALUE as for the step"),
        ("settle", "close runs that failed launches left RUNNING"),
        ("explain", "say why an entry point does not run there"),
    ):
        command = commands.add_parser(name, help=about, allow_abbrev=False)
        if name in ("run", "explain"):
            command.add_argument("entry_point")
        if name in ("run", "settle"):
            command.add_argument(
                "--experiment-name", default=os.environ.get("MLFLOW_EXPERIMENT_NAME", "/Shared/alacarte")
            )
        if name in ("stage", "run"):
            command.add_argument("--backend-config", default=str(stage.ROOT / "databricks" / "cluster.json"))
        if name == "run":
            command.add_argument("--poll-seconds", type=float, default=10.0)
    options, tokens = parser.parse_known_args(list(arguments))
    if tokens and options.command != "run":
        parser.error(f"{options.command} takes no {tokens[0]}")
    try:
        if options.command == "explain":
            raise UserError(stage.NOT_THERE[options.entry_point])
        check_tracking()
        if options.command == "settle":
            settle(open_experiment(options.experiment_name))
            return 0
        cluster = stage.read_cluster(options.backend_config)
        if options.command == "run":
            return run(options.entry_point, tokens, cluster, options.experiment_name, options.poll_seconds)
        stage_project()
        return 0
    except UserError as error:
        print(f"databricks: {error}", file=sys.stderr)
        return 2
    except LOST as error:
        print(f"databricks: {_first_line(error)}", file=sys.stderr)
        return 1


def stage_project() -> None:
    left_out = stage.stage(stage.ROOT, git_tags())
    print(f"databricks: staged {stage.STAGED}", flush=True)
    if left_out:
        print(f"databricks: left out as data: {', '.join(left_out)}; data.path=/Volumes/... reaches what is there")


# --- what cannot work, before it costs a cluster ---------------------------------------------------------------------


def check_tracking() -> None:
    """UserError where runs would go to a place that the job does not log to: it only knows its workspace."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("databricks"):
        shown = "your own server" if uri.startswith("http") else "a store on this machine"
        raise UserError(f"MLFLOW_TRACKING_URI is {shown}, and a job logs to its workspace: set it to databricks")


def as_parameters(tokens: Sequence[str]) -> dict[str, str]:
    """The `-P` parameters that say what `tokens` say: MLflow allows neither flags nor signs in a parameter's name."""
    return {"overrides": shlex.join(tokens)} if tokens else {}


def check_arguments(entry_point: str, tokens: Sequence[str]) -> None:
    """UserError for what the step itself would refuse, and for what does not run there."""
    known = stage.entry_points(stage.ROOT)
    if entry_point not in known:
        raise UserError(f"{entry_point} is no entry point: there is {', '.join(known)}")
    if entry_point in stage.NOT_THERE:
        raise UserError(stage.NOT_THERE[entry_point])
    cfg = launch.compose(entry_point, tokens)
    if cfg is not None and entry_point != "train":  # which has the key and asks no registry
        registry.check_name(cfg.get("registered_model_name"))


def check_experiment(name: str) -> None:
    """UserError for a name that is no path: experiments are files of the workspace there."""
    if not name.startswith("/"):
        raise UserError(f"--experiment-name {name} is no path of the workspace: write /Shared/{Path(name).name}")


# --- a job -----------------------------------------------------------------------------------------------------------


def run(entry_point: str, tokens: Sequence[str], cluster: dict[str, Any], experiment: str, every: float) -> int:
    """Run an entry point to its end; its exit code. The run that it gets never stays RUNNING."""
    check_arguments(entry_point, tokens)
    check_experiment(experiment)
    stage_project()
    experiment_id = open_experiment(experiment)
    settle(experiment_id)
    opened = _create(entry_point, experiment_id)
    job: int | None = None
    runner = DatabricksJobRunner(mlflow.get_tracking_uri())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        job = _submit(runner, entry_point, as_parameters(tokens), cluster, opened)
        MlflowClient().set_tag(opened.info.run_id, MLFLOW_DATABRICKS_SHELL_JOB_RUN_ID, job)
        follow(runner, job, every, opened.info.run_id)
    except KeyboardInterrupt:
        if job is not None:
            runner.jobs_runs_cancel(job)
        MlflowClient().set_terminated(opened.info.run_id, "KILLED")
        print(f"databricks: stopped, and its job with it\nrun_id={opened.info.run_id}")
        return 130
    except BaseException:
        if job is None or _ended(runner, job):  # else the step goes on without us, and ends its run itself
            _close(opened.info.run_id)
        raise
    _close(opened.info.run_id)
    ended = MlflowClient().get_run(opened.info.run_id)
    return report(entry_point, ended, runner.jobs_runs_get(job)["state"])


def report(entry_point: str, ended: Run, state: dict[str, Any]) -> int:
    """Print how it ended; the exit code of the step, 1 where it never came to one."""
    succeeded = state.get("result_state") == "SUCCESS"
    said = "" if succeeded else f": {ended.data.tags.get('error') or state.get('state_message', '')}"
    print(f"databricks: {entry_point} {'succeeded' if succeeded else 'failed'}, its run is {ended.info.status}{said}")
    print(f"run_id={ended.info.run_id}", flush=True)
    code = int(ended.data.tags.get("exit_code", 0 if succeeded else 1))
    return code if succeeded else code or 1


def open_experiment(name: str) -> str:
    """The id of an experiment, which is made where there is none."""
    check_experiment(name)
    found = MlflowClient().get_experiment_by_name(name)
    return found.experiment_id if found else MlflowClient().create_experiment(name)


def _create(entry_point: str, experiment_id: str) -> Run:
    """The run that the step will resume, with the tags of `mlflow run`."""
    tags = {MLFLOW_USER: os.environ.get("USER", "unknown"), MLFLOW_SOURCE_NAME: str(stage.ROOT)}
    tags |= {
        MLFLOW_SOURCE_TYPE: "PROJECT",
        MLFLOW_PROJECT_ENTRY_POINT: entry_point,
        MLFLOW_PROJECT_BACKEND: "databricks",
    }
    return MlflowClient().create_run(experiment_id, tags={**tags, **git_tags()})


def _submit(
    runner: DatabricksJobRunner, entry_point: str, parameters: dict[str, str], cluster: dict[str, Any], opened: Run
) -> int:
    """Upload the staged project and start a job with it; the number of its run."""
    staged = str(stage.ROOT / stage.STAGED)
    return runner.run_databricks_spark_job(
        project_uri=staged, work_dir=staged, experiment_id=opened.info.experiment_id, cluster_spec=cluster,
        run_id=opened.info.run_id, project_spec=load_project(staged), entry_point=entry_point, parameters=parameters,
    )  # fmt: skip


def follow(runner: DatabricksJobRunner, job: int, every: float, run_id: str) -> None:
    """Print each state of a job until it has ended. Raises what kept it from being seen for longer than PATIENCE."""
    shown, heard, page = "", time.monotonic(), None
    while True:
        try:
            seen = runner.jobs_runs_get(job)
            state, heard = seen["state"], time.monotonic()
            if page is None:
                page = seen.get("run_page_url", "")
                MlflowClient().set_tag(run_id, MLFLOW_DATABRICKS_RUN_URL, page)
                print(f"databricks: {page}", flush=True)
        except LOST as error:
            refused = isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)
            if refused or time.monotonic() - heard > PATIENCE:
                print(f"databricks: job run {job} goes on unseen; once you are logged in again: {AGAIN}", flush=True)
                raise
            print(f"databricks: no answer, asked again: {_first_line(error)}", flush=True)
            time.sleep(every)
            continue
        text = " ".join(
            filter(None, (state["life_cycle_state"], state.get("result_state"), state.get("state_message")))
        )
        if text != shown:
            print(f"databricks: {text}", flush=True)
            shown = text
        if state["life_cycle_state"] in ENDED:
            return
        time.sleep(every)


def settle(experiment_id: str) -> None:
    """Close the RUNNING runs of an experiment whose job has ended, or that never came to one."""
    client, runner = MlflowClient(), DatabricksJobRunner(mlflow.get_tracking_uri())
    condition = f"attributes.status = 'RUNNING' and tags.`{MLFLOW_PROJECT_BACKEND}` = 'databricks'"
    for left in client.search_runs([experiment_id], filter_string=condition):
        job = left.data.tags.get(MLFLOW_DATABRICKS_SHELL_JOB_RUN_ID)
        age = time.time() - left.info.start_time / 1000
        if _ended(runner, int(job)) if job else age > SUBMITTING:
            print(f"databricks: closed run {left.info.run_id}, which an earlier launch left RUNNING")
            _close(left.info.run_id)


def _ended(runner: DatabricksJobRunner, job: int) -> bool:
    try:
        return runner.jobs_runs_get(job)["state"]["life_cycle_state"] in ENDED
    except LOST:
        return False


def _close(run_id: str) -> None:
    """FAILED for a run that its step left RUNNING: a step that ran to its end has closed it."""
    try:
        status = MlflowClient().get_run(run_id).info.status
        if not RunStatus.is_terminated(RunStatus.from_string(status)):
            MlflowClient().set_terminated(run_id, "FAILED")
    except LOST:
        print(f"databricks: run {run_id} stays RUNNING; once you are logged in again: {AGAIN}", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
