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
from mlflow.utils import mlflow_tags

from alacarte import launch, registry
from alacarte.databricks import stage
from alacarte.errors import UserError
from alacarte.source import git_tags
from alacarte.stores import first_line

JOB_TAG = mlflow_tags.MLFLOW_DATABRICKS_SHELL_JOB_RUN_ID
END_STATES = ("TERMINATED", "SKIPPED", "INTERNAL_ERROR")
MAX_SUBMIT_SECONDS = 600  # an older run without a job was left by a launch that failed
MAX_SILENT_SECONDS = 300  # without an answer of the workspace, before this program stops waiting for a job
NO_ANSWER = (MlflowException, requests.exceptions.RequestException, OSError)
SETTLE = "python -m alacarte.databricks settle"


def main(arguments: Sequence[str]) -> int:
    """The command line of `python -m alacarte.databricks`; returns the exit code."""
    options, tokens = _parse(arguments)
    try:
        if options.command == "explain":
            raise UserError(stage.NOT_THERE[options.entry_point])
        uri = mlflow.get_tracking_uri()
        if not uri.startswith("databricks"):
            kind = "your own server" if uri.startswith("http") else "a store on this machine"
            raise UserError(f"MLFLOW_TRACKING_URI is {kind}, but a job logs to its workspace: set it to databricks")
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
    except NO_ANSWER as error:
        print(f"databricks: {first_line(error)}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this program, and the arguments of the step."""
    experiment, cluster, entry_point = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    default = os.environ.get("MLFLOW_EXPERIMENT_NAME", "/Shared/alacarte")
    experiment.add_argument("--experiment-name", default=default)
    cluster.add_argument("--backend-config", default=str(stage.ROOT / "databricks" / "cluster.json"))
    entry_point.add_argument("entry_point")
    parser = argparse.ArgumentParser(prog="python -m alacarte.databricks", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, parents, text in (
        ("stage", [cluster], "make build/databricks"),
        ("run", [entry_point, experiment, cluster], "stage, submit, wait; then KEY=VALUE and --KEY VALUE for the step"),
        ("settle", [experiment], "close runs that failed launches left RUNNING"),
        ("explain", [entry_point], "say why an entry point does not run there"),
    ):
        command = commands.add_parser(name, parents=parents, help=text, allow_abbrev=False)
        if name == "run":
            command.add_argument("--poll-seconds", type=float, default=10.0)
    options, tokens = parser.parse_known_args(list(arguments))
    if tokens and options.command != "run":
        parser.error(f"{options.command} takes no {tokens[0]}")
    return options, tokens


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
    entry_points = stage.entry_points(stage.ROOT)
    if entry_point not in entry_points:
        raise UserError(f"{entry_point} is no entry point: there is {', '.join(entry_points)}")
    if entry_point in stage.NOT_THERE:
        raise UserError(stage.NOT_THERE[entry_point])
    cfg = launch.compose(entry_point, tokens)
    if cfg is not None and entry_point != "train":  # which has the key but does not use a registry
        registry.check_name(cfg.get("registered_model_name"))


def open_experiment(name: str) -> str:
    """The id of an experiment, which is created if there is none."""
    if not name.startswith("/"):
        raise UserError(f"--experiment-name {name} is no path of the workspace: write /Shared/{Path(name).name}")
    experiment = MlflowClient().get_experiment_by_name(name)
    return experiment.experiment_id if experiment else MlflowClient().create_experiment(name)


# --- a job -----------------------------------------------------------------------------------------------------------


def run(entry_point: str, tokens: Sequence[str], cluster: dict[str, Any], experiment: str, poll_seconds: float) -> int:
    """Run an entry point to its end; its exit code. Its MLflow run never stays RUNNING."""
    check_arguments(entry_point, tokens)
    experiment_id = open_experiment(experiment)
    stage_project()
    settle(experiment_id)
    run_id = _create_run(entry_point, experiment_id).info.run_id
    job: int | None = None
    runner = DatabricksJobRunner(mlflow.get_tracking_uri())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        job = _submit(runner, entry_point, as_parameters(tokens), cluster, experiment_id, run_id)
        MlflowClient().set_tag(run_id, JOB_TAG, job)
        follow(runner, job, poll_seconds, run_id)
    except KeyboardInterrupt:
        if job is not None:
            runner.jobs_runs_cancel(job)
        MlflowClient().set_terminated(run_id, "KILLED")
        print(f"databricks: stopped, and its job with it\nrun_id={run_id}")
        return 130
    except BaseException:
        if job is None or _has_ended(runner, job):  # otherwise the step continues, and closes its run itself
            _close(run_id)
        raise
    _close(run_id)
    return report(entry_point, MlflowClient().get_run(run_id), runner.jobs_runs_get(job)["state"])


def report(entry_point: str, step_run: Run, state: dict[str, Any]) -> int:
    """Print the result of a job; the exit code of the step, or 1 if the step never started."""
    succeeded = state.get("result_state") == "SUCCESS"
    reason = "" if succeeded else f": {step_run.data.tags.get('error') or state.get('state_message', '')}"
    print(
        f"databricks: {entry_point} {'succeeded' if succeeded else 'failed'}, its run is {step_run.info.status}{reason}"
    )
    print(f"run_id={step_run.info.run_id}", flush=True)
    code = int(step_run.data.tags.get("exit_code", 0 if succeeded else 1))
    return code if succeeded else code or 1


def _create_run(entry_point: str, experiment_id: str) -> Run:
    """The run that the step will resume, with the tags of `mlflow run`."""
    tags = {
        mlflow_tags.MLFLOW_USER: os.environ.get("USER", "unknown"),
        mlflow_tags.MLFLOW_SOURCE_NAME: str(stage.ROOT),
        mlflow_tags.MLFLOW_SOURCE_TYPE: "PROJECT",
        mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT: entry_point,
        mlflow_tags.MLFLOW_PROJECT_BACKEND: "databricks",
    }
    return MlflowClient().create_run(experiment_id, tags={**tags, **git_tags()})


def _submit(
    runner: DatabricksJobRunner, entry_point: str, parameters: dict[str, str], cluster: dict[str, Any],
    experiment_id: str, run_id: str,
) -> int:  # fmt: skip
    """Upload the staged project and start a job with it; the number of the job's run."""
    staged = str(stage.ROOT / stage.STAGED)
    return runner.run_databricks_spark_job(
        project_uri=staged, work_dir=staged, experiment_id=experiment_id, cluster_spec=cluster, run_id=run_id,
        project_spec=load_project(staged), entry_point=entry_point, parameters=parameters,
    )  # fmt: skip


def follow(runner: DatabricksJobRunner, job: int, poll_seconds: float, run_id: str) -> None:
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
        except NO_ANSWER as error:
            is_refused = isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)
            if is_refused or time.monotonic() - last_answer > MAX_SILENT_SECONDS:
                print(f"databricks: job run {job} goes on unseen; after the next login: {SETTLE}", flush=True)
                raise
            print(f"databricks: no answer, asked again: {first_line(error)}", flush=True)
            time.sleep(poll_seconds)
            continue
        words = (state["life_cycle_state"], state.get("result_state"), state.get("state_message"))
        text = " ".join(filter(None, words))
        if text != last_text:
            print(f"databricks: {text}", flush=True)
            last_text = text
        if state["life_cycle_state"] in END_STATES:
            return
        time.sleep(poll_seconds)


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
