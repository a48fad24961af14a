"""The job on Databricks: run one step of this project in a process that knows nothing of it.

`mlflow run -b databricks` runs a copy of this text behind lines of its own: there is no `__file__`, the project is the
working directory and not on sys.path, and the command came without a shell, cut at each space. A task of databricks.yml
runs this file itself, with whole arguments; there, a run is opened by the step, and these words hand it on:

    @experiment=/Shared/NAME   where the runs of this task go
    @job={{job.run_id}}        a tag `job_run_id` on each of its runs, by which the next task finds them
    @run_id=train              becomes run_id=<id of the train run of this job>
    @secret=NAME:scope/key     a variable with a secret of the workspace, such as PGPASSWORD for feedback.url
    @if=monitor                ends here unless the monitor run of this job said that it is time to retrain
"""

import base64
import contextlib
import json
import os
import runpy
import shlex
import sys
from pathlib import Path

OPENED = os.environ.get("MLFLOW_RUN_ID")  # read first: the first start_run deletes it
STARTS_STEPS = ("steps.pipeline", "steps.retrain", "steps.monitor")
YES = 3  # exit code of monitor: time to retrain, which is no failure


class Heard:
    """A stream that remembers what was last said, for whoever waits elsewhere and does not see this log."""

    last = ""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        lines = [line for line in text.splitlines() if line.strip()]
        Heard.last = lines[-1] if lines else Heard.last
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def words(arguments):
    """The arguments as they were typed: MLflow quotes each for a shell, joins them, and cuts the text at its spaces."""
    return shlex.split(" ".join(arguments)) if OPENED else list(arguments)


def hand_over(arguments):
    """Take the @words of a task out and do as they say; None where there is nothing to do."""
    if OPENED:
        return arguments
    import mlflow

    told = dict(word[1:].split("=", 1) for word in arguments if word.startswith("@"))
    rest = [word for word in arguments if not word.startswith("@")]
    if "experiment" in told:
        os.environ["MLFLOW_EXPERIMENT_NAME"] = told["experiment"]
        mlflow.set_experiment(told["experiment"])
    if "secret" in told:
        name, place = told["secret"].split(":", 1)
        os.environ[name] = secret(*place.split("/", 1))
    if "job" in told:
        os.environ["MLFLOW_RUN_CONTEXT"] = json.dumps({"job_run_id": told["job"]})

    def run_of(step):
        condition = f"attributes.status = 'FINISHED' and tags.step = '{step}' and tags.job_run_id = '{told['job']}'"
        newest = ["attributes.start_time DESC"]
        found = mlflow.search_runs(filter_string=condition, order_by=newest, max_results=1, output_format="list")
        if not found:
            raise SystemExit(f"no finished run of {step} has the tag job_run_id={told['job']}")
        return found[0]

    if "if" in told and run_of(told["if"]).data.tags.get("retrain") != "yes":
        print(f"{told['if']} did not ask for it: nothing to do")
        return None
    if "run_id" in told:
        rest.append(f"run_id={run_of(told['run_id']).info.run_id}")
    return rest


def secret(scope, key):
    """A secret of the workspace."""
    from databricks.sdk import WorkspaceClient

    return base64.b64decode(WorkspaceClient().secrets.get_secret(scope, key).value or "").decode()


def for_children():
    """Give the workspace and its token to the steps that this one starts, which no notebook context reaches."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.databricks_utils import get_databricks_env_vars

    with contextlib.suppress(MlflowException):
        found = get_databricks_env_vars("databricks")
        os.environ.update({key: value for key, value in found.items() if value and key not in os.environ})


def run(module, arguments):
    """The exit code of `python -m module arguments`, run in this process, where the driver's `spark` is."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def close(code, line):
    """Leave the run that `mlflow run` opened with an end, and with what to tell whoever started it."""
    from mlflow import MlflowClient
    from mlflow.entities import RunStatus

    client = MlflowClient()
    client.set_tag(OPENED, "exit_code", code)
    if code:
        client.set_tag(OPENED, "error", line[:5000])
    if not RunStatus.is_terminated(RunStatus.from_string(client.get_run(OPENED).info.status)):
        client.set_terminated(OPENED, "FAILED" if code not in (0, YES) else "FINISHED")


def boot():
    near = [Path.cwd(), *([Path(__file__).resolve()] if "__file__" in globals() else [])]
    root = next(up for place in near for up in (place, *place.parents) if (up / "MLproject").is_file())
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ.setdefault("MLFLOW_TRACKING_URI", "databricks")
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Heard(sys.stdout), Heard(sys.stderr)
    code = 1
    try:
        module, *arguments = words(sys.argv[1:])
        if module in STARTS_STEPS:
            for_children()
        if (rest := hand_over(arguments)) is None:
            return
        code = run(module, rest)
    except BaseException as error:
        Heard.last = f"{type(error).__name__}: {error}"
        raise
    finally:
        sys.stdout, sys.stderr = streams
        if OPENED:
            close(code, Heard.last)
    if code not in (0, YES):  # only an exception fails a job: the exit code of its process is not looked at
        raise RuntimeError(f"{module} ended with exit code {code}: {Heard.last}")


boot()
