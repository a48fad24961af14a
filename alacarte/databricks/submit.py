"""Run the entry points on Databricks: stage the project, submit a job, wait for it, and end with the exit code of the step.

    python -m alacarte.databricks stage
    python -m alacarte.databricks run train --experiment-name /Shared/alacarte model=torch_mlp

`mlflow run build/databricks -b databricks` submits the same job, but it does not wait for it. If something fails before the
step begins, its MLflow run stays RUNNING. Here this program closes the run, or its next call does.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException
from mlflow.projects._project_spec import load_project
from mlflow.projects.databricks import DatabricksJobRunner
from mlflow.utils import mlflow_tags

from alacarte import launch, registry, signals
from alacarte.databricks import stage
from alacarte.errors import UserError, first_line
from alacarte.source import git_tags

JOB_TAG = mlflow_tags.MLFLOW_DATABRICKS_SHELL_JOB_RUN_ID
END_STATES = ("TERMINATED", "SKIPPED", "INTERNAL_ERROR")
POLL_SECONDS = 2.0
MAX_SUBMIT_SECONDS = 600  # an older run without a job was left by a launch that failed
MAX_SILENT_SECONDS = 300  # without an answer of the workspace, before this program stops waiting for a job
NO_ANSWER = (MlflowException, requests.exceptions.RequestException, OSError)
SETTLE = "python -m alacarte.databricks settle"


def main(arguments: Sequence[str]) -> int:
    """The command line of `python -m alacarte.databricks`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m alacarte.databricks", allow_abbrev=False)
    parser.add_argument("command", choices=["stage", "run", "settle"], help="settle: close what launches left RUNNING")
    parser.add_argument("entry_point", nargs="?", help="of run, followed by KEY=VALUE or --KEY VALUE for the step")
    default = os.environ.get("MLFLOW_EXPERIMENT_NAME", "/Shared/alacarte")
    parser.add_argument("--experiment-name", default=default, help=default)
    parser.add_argument("--backend-config", default=stage.ROOT / "databricks" / "cluster.json", help="the cluster")
    options, tokens = parser.parse_known_args(list(arguments))
    if (options.command == "run") != bool(options.entry_point):
        parser.error("run takes an entry point, stage and settle take none")
    try:
        if not (uri := mlflow.get_tracking_uri()).startswith("databricks"):
            kind = "your own server" if uri.startswith("http") else "a store on this machine"
            raise UserError(f"MLFLOW_TRACKING_URI is {kind}, but a job logs to its workspace: set it to databricks")
        if options.command == "settle":
            settle(open_experiment(options.experiment_name))
            return 0
        cluster = stage.read_cluster(options.backend_config)
        if options.command == "run":
            return run(options.entry_point, tokens, cluster, options.experiment_name)
        stage_project()
        return 0
    except UserError as error:
        print(f"databricks: {error}", file=sys.stderr)
        return 2
    except NO_ANSWER as error:
        print(f"databricks: {first_line(error)}", file=sys.stderr)
        return 1


def stage_project() -> None:
    """Make build/databricks and print the files that were left out."""
    left_out = stage.stage(stage.ROOT, git_tags())
    print(f"databricks: staged {stage.STAGED}", flush=True)
    if left_out:
        print(f"databricks: left out as data: {', '.join(left_out)}; data.path=/Volumes/... reaches files there")


def as_parameters(tokens: Sequence[str]) -> dict[str, str]:
    """The arguments of a step as `-P` parameters: MLflow allows neither flags nor signs in a parameter's name."""
    return {"overrides": shlex.join(tokens)} if tokens else {}


def check_arguments(entry_point: str, tokens: Sequence[str]) -> None:
    """UserError for arguments that the step would refuse, before they cost a cluster."""
    if entry_point not in (entry_points := stage.entry_points(stage.ROOT)):
        why = (
            ": for requests there is the endpoint of databricks/databricks.yml"
            if entry_point == stage.NOT_THERE
            else ""
        )
        raise UserError(f"{entry_point} does not run as a job{why}; choose one of {', '.join(entry_points)}")
    cfg = launch.compose(entry_point, tokens)
    if cfg is not None and entry_point != "train":  # which has the key but does not use a registry
        registry.check_name(cfg.get("registered_model_name"))


def open_experiment(name: str) -> str:
    """The id of an experiment, which is created if there is none."""
    if not name.startswith("/"):
        raise UserError(f"--experiment-name {name} is no path of the workspace: write /Shared/{Path(name).name}")
    experiment = MlflowClient().get_experiment_by_name(name)
    return experiment.experiment_id if experiment else MlflowClient().create_experiment(name)


@signals.raised()
def run(entry_point: str, tokens: Sequence[str], cluster: dict[str, Any], experiment: str) -> int:
    """Run an entry point to its end; its exit code. Its MLflow run never stays RUNNING."""
    check_arguments(entry_point, tokens)
    experiment_id = open_experiment(experiment)
    stage_project()
    settle(experiment_id)
    tags = {
        mlflow_tags.MLFLOW_USER: os.environ.get("USER", "unknown"),
        mlflow_tags.MLFLOW_SOURCE_NAME: str(stage.ROOT),
        mlflow_tags.MLFLOW_SOURCE_TYPE: "PROJECT",
        mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT: entry_point,
        mlflow_tags.MLFLOW_PROJECT_BACKEND: "databricks",
    }
    client, runner = MlflowClient(), DatabricksJobRunner(mlflow.get_tracking_uri())
    run_id = client.create_run(experiment_id, tags={**tags, **git_tags()}).info.run_id
    job: int | None = None
    staged = str(stage.ROOT / stage.STAGED)
    try:
        job = runner.run_databricks_spark_job(
            project_uri=staged, work_dir=staged, experiment_id=experiment_id, cluster_spec=cluster, run_id=run_id,
            project_spec=load_project(staged), entry_point=entry_point, parameters=as_parameters(tokens),
        )  # fmt: skip
        client.set_tag(run_id, JOB_TAG, job)
        follow(runner, job, run_id)
    except BaseException:
        if signals.arrived:  # a library may replace the exception of a signal
            if job is not None:
                runner.jobs_runs_cancel(job)
            client.set_terminated(run_id, "KILLED")
            print(f"databricks: stopped, and its job with it\nrun_id={run_id}")
            return 128 + signals.arrived
        if job is None or _has_ended(runner, job):  # otherwise the step continues, and closes its run itself
            _close(run_id)
        raise
    _close(run_id)
    ended, state = client.get_run(run_id), runner.jobs_runs_get(job)["state"]
    succeeded = state.get("result_state") == "SUCCESS"
    reason = "" if succeeded else f": {ended.data.tags.get('error') or state.get('state_message', '')}"
    word = "succeeded" if succeeded else "failed"
    print(f"databricks: {entry_point} {word}, its run is {ended.info.status}{reason}\nrun_id={run_id}", flush=True)
    code = int(ended.data.tags.get("exit_code", 0))  # monitor says yes with 3, which is no failure
    return code if succeeded else code or 1


def follow(runner: DatabricksJobRunner, job: int, run_id: str) -> None:
    """Print each state of a job until it has ended. Raises the error of a workspace that does not answer for too long."""
    last_text, last_answer, page = "", time.monotonic(), None
    while True:
        try:
            answer = runner.jobs_runs_get(job)
            state, last_answer = answer["state"], time.monotonic()
            if page is None:
                page = answer.get("run_page_url", "")
                MlflowClient().set_tag(run_id, mlflow_tags.MLFLOW_DATABRICKS_RUN_URL, page)
                print(f"databricks: {page}", flush=True)
            text = " ".join(filter(None, map(state.get, ("life_cycle_state", "result_state", "state_message"))))
            if text != last_text:
                print(f"databricks: {text}", flush=True)
                last_text = text
            if state["life_cycle_state"] in END_STATES:
                return
        except NO_ANSWER as error:
            is_refused = isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)
            if is_refused or time.monotonic() - last_answer > MAX_SILENT_SECONDS:
                print(f"databricks: job run {job} goes on unseen; after the next login: {SETTLE}", flush=True)
                raise
            print(f"databricks: no answer, asked again: {first_line(error)}", flush=True)
        time.sleep(POLL_SECONDS)


def settle(experiment_id: str) -> None:
    """Close the RUNNING runs of an experiment whose job has ended or never started."""
    client, runner = MlflowClient(), DatabricksJobRunner(mlflow.get_tracking_uri())
    condition = f"attributes.status = 'RUNNING' and tags.`{mlflow_tags.MLFLOW_PROJECT_BACKEND}` = 'databricks'"
    for running in client.search_runs([experiment_id], filter_string=condition):
        job = running.data.tags.get(JOB_TAG)
        age = time.time() - running.info.start_time / 1000
        if _has_ended(runner, int(job)) if job else age > MAX_SUBMIT_SECONDS:
            print(f"databricks: closed run {running.info.run_id}, which an earlier launch left RUNNING")
            _close(running.info.run_id)


def _has_ended(runner: DatabricksJobRunner, job: int) -> bool:
    try:
        return runner.jobs_runs_get(job)["state"]["life_cycle_state"] in END_STATES
    except NO_ANSWER:
        return False


def _close(run_id: str) -> None:
    """Mark a run FAILED if its step left it RUNNING: a step that ended normally has closed it."""
    try:
        status = MlflowClient().get_run(run_id).info.status
        if not RunStatus.is_terminated(RunStatus.from_string(status)):
            MlflowClient().set_terminated(run_id, "FAILED")
    except NO_ANSWER:
        print(f"databricks: run {run_id} stays RUNNING; after the next login: {SETTLE}", file=sys.stderr)
