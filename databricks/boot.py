"""The job on Databricks: run one step of this project on a machine that has only the uploaded files.

`mlflow run -b databricks` runs a copy of this text behind lines of its own: there is no `__file__`, the project is the
working directory but not on sys.path, and the arguments were split at each space. A task of databricks.yml runs this file
itself, with complete arguments. There the step opens its run, and these words connect the tasks of a job:

    @experiment=/Shared/NAME   the experiment of this task's runs
    @job={{job.run_id}}        a tag `job_run_id` on each of its runs, by which the next task finds them
    @run_id=train              becomes run_id=<id of the train run of this job>
    @secret=NAME:scope/key     an environment variable with a secret of the workspace, such as PGPASSWORD
    @if=monitor                do nothing unless the monitor run of this job decided to retrain
"""

import base64
import contextlib
import json
import os
import runpy
import shlex
import sys
from pathlib import Path

RUN_ID = os.environ.get("MLFLOW_RUN_ID")  # read first: the first start_run deletes it
STARTS_STEPS = ("steps.pipeline", "steps.retrain", "steps.monitor")
RETRAIN = 3  # exit code of monitor: time to retrain, which is no failure


class LastLine:
    """A stream that remembers its last line, for the user who waits elsewhere and does not see this log."""

    text = ""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        lines = [line for line in text.splitlines() if line.strip()]
        LastLine.text = lines[-1] if lines else LastLine.text
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def join_words(arguments):
    """The arguments as typed: MLflow quotes each for a shell, joins them, and splits the text at its spaces."""
    return shlex.split(" ".join(arguments)) if RUN_ID else list(arguments)


def apply_words(arguments):
    """Apply the @words of a task and return the other arguments; None if there is nothing to do."""
    if RUN_ID:
        return arguments
    import mlflow

    words = dict(word[1:].split("=", 1) for word in arguments if word.startswith("@"))
    rest = [word for word in arguments if not word.startswith("@")]
    if "experiment" in words:
        os.environ["MLFLOW_EXPERIMENT_NAME"] = words["experiment"]
        mlflow.set_experiment(words["experiment"])
    if "secret" in words:
        name, place = words["secret"].split(":", 1)
        os.environ[name] = secret(*place.split("/", 1))
    if "job" in words:
        os.environ["MLFLOW_RUN_CONTEXT"] = json.dumps({"job_run_id": words["job"]})

    def run_of(step):
        condition = f"attributes.status = 'FINISHED' and tags.step = '{step}' and tags.job_run_id = '{words['job']}'"
        newest = ["attributes.start_time DESC"]
        runs = mlflow.search_runs(filter_string=condition, order_by=newest, max_results=1, output_format="list")
        if not runs:
            raise SystemExit(f"no finished run of {step} has the tag job_run_id={words['job']}")
        return runs[0]

    if "if" in words and run_of(words["if"]).data.tags.get("retrain") != "yes":
        print(f"{words['if']} did not ask for it: nothing to do")
        return None
    if "run_id" in words:
        rest.append(f"run_id={run_of(words['run_id']).info.run_id}")
    return rest


def secret(scope, key):
    """A secret of the workspace."""
    from databricks.sdk import WorkspaceClient

    return base64.b64decode(WorkspaceClient().secrets.get_secret(scope, key).value or "").decode()


def share_login():
    """Put the workspace and its token into the environment, for the steps that this step starts as processes."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.databricks_utils import get_databricks_env_vars

    with contextlib.suppress(MlflowException):
        variables = get_databricks_env_vars("databricks")
        os.environ.update({key: value for key, value in variables.items() if value and key not in os.environ})


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
    """End the run that `mlflow run` opened, with the exit code and the error for the user who started it."""
    from mlflow import MlflowClient
    from mlflow.entities import RunStatus

    client = MlflowClient()
    client.set_tag(RUN_ID, "exit_code", code)
    if code:
        client.set_tag(RUN_ID, "error", line[:5000])
    if not RunStatus.is_terminated(RunStatus.from_string(client.get_run(RUN_ID).info.status)):
        client.set_terminated(RUN_ID, "FAILED" if code not in (0, RETRAIN) else "FINISHED")


def boot():
    near = [Path.cwd(), *([Path(__file__).resolve()] if "__file__" in globals() else [])]
    root = next(up for place in near for up in (place, *place.parents) if (up / "MLproject").is_file())
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ.setdefault("MLFLOW_TRACKING_URI", "databricks")
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = LastLine(sys.stdout), LastLine(sys.stderr)
    code = 1
    try:
        module, *arguments = join_words(sys.argv[1:])
        if module in STARTS_STEPS:
            share_login()
        if (rest := apply_words(arguments)) is None:
            return
        code = run(module, rest)
    except BaseException as error:
        LastLine.text = f"{type(error).__name__}: {error}"
        raise
    finally:
        sys.stdout, sys.stderr = streams
        if RUN_ID:
            close(code, LastLine.text)
    if code not in (0, RETRAIN):  # only an exception fails a job: the exit code of its process is not looked at
        raise RuntimeError(f"{module} ended with exit code {code}: {LastLine.text}")


boot()
