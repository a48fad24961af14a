"""Jobs of the stand-in workspace: what was submitted is taken from DBFS and executed as a driver does."""

import os
import subprocess
import threading
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from conftest import environment
from preloaded import programs

if TYPE_CHECKING:
    from workspace import Workspace

RSYNC = '#!/bin/sh\nfor from; do to=$last; last=$from; done\nexec cp --no-clobber "$to" "$last"\n'
# A driver executes the text of the script: it has no __file__, and its folder is not on sys.path.
DRIVER = """import sys
sys.argv, sys.path = sys.argv[1:], sys.path[1:]
exec(compile(open(sys.argv[0]).read(), "<job>", "exec"), {"__name__": "__main__"})"""


class Job:
    """A submitted run: its files are taken from DBFS and executed as a driver does, behind MLflow's own lines."""

    def __init__(self, number: int, body: dict) -> None:
        self.number, self.body = number, body
        self.state = {"life_cycle_state": "PENDING", "state_message": "Waiting for cluster"}
        self.process: subprocess.Popen | None = None
        self.cancelled = False
        self.has_ended = threading.Event()
        self.log = ""

    def run(self, workspace: "Workspace") -> None:
        cluster = self.body["new_cluster"]
        missing = [each["pypi"]["package"] for each in self.body["libraries"] if not installed(each["pypi"]["package"])]
        if missing or cluster.get("num_workers", 0) > 8:
            self.end("INTERNAL_ERROR", "FAILED", f"Library installation failed: {missing}" if missing else "Over quota")
            return
        driver = workspace.root / f"driver-{self.number}"
        (driver / "bin").mkdir(parents=True)
        (driver / "bin" / "rsync").write_text(RSYNC)
        (driver / "bin" / "rsync").chmod(0o755)
        task = self.body["spark_python_task"]
        text = workspace.dbfs(task["python_file"].removeprefix("dbfs:")).read_text()
        text = text.replace("/databricks/mlflow", f"{driver}/mlflow").replace("/dbfs/", f"{workspace.root}/dbfs/")
        (driver / "job.py").write_text(text)
        (driver / "driver.py").write_text(DRIVER)
        env = environment(
            DATABRICKS_HOST=workspace.url, DATABRICKS_TOKEN=workspace.job_token, **cluster.get("spark_env_vars", {})
        )
        env = {key: value for key, value in env.items() if not key.startswith(("PYTHONPATH", "PYTEST"))}
        env["PATH"] = os.pathsep.join([f"{driver}/bin", programs(), env["PATH"]])
        command = [f"{programs()}/python", "-m", "driver", str(driver / "job.py"), *task["parameters"]]
        self.process = subprocess.Popen(
            command,
            cwd=driver,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if self.cancelled:  # before there was a process
            self.process.kill()
        else:
            self.state = {"life_cycle_state": "RUNNING", "state_message": "In run"}
        # Ends with the step, which outlives the killed process by a moment and could otherwise open its run again.
        self.log, _ = self.process.communicate()
        self.has_ended.set()
        code = self.process.returncode
        if not self.cancelled:
            self.end("TERMINATED", "FAILED" if code else "SUCCESS", "Workload failed, see run output" if code else "")

    def end(self, life_cycle: str, result: str, message: str) -> None:
        self.state = {"life_cycle_state": life_cycle, "result_state": result, "state_message": message}

    def cancel(self) -> None:
        self.cancelled = True
        if self.process:
            self.process.kill()
            self.has_ended.wait(30)
        self.end("TERMINATED", "CANCELED", "Run cancelled")


def installed(package: str) -> bool:
    """Whether this machine has just that version, and so the job what it would have there."""
    name, _, number = package.partition("==")
    try:
        return bool(number) and version(name).split("+")[0] == number
    except PackageNotFoundError:
        return False
