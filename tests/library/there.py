"""A checkout of the project and a workspace to send it to, as one who uses both has them."""

import io
import os
import signal
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from conftest import environment
from mlflow import MlflowClient
from preloaded import programs
from workspace import Workspace

from alacarte.databricks import stage
from alacarte.databricks import submit as databricks

EXPERIMENT = "/Shared/tests"
MODEL = "main.default.digits"
SMALL = ("model=sklearn_sgd", "data.stop=600")


@dataclass
class There:
    """A checkout of the project, and a workspace to send it to."""

    root: Path
    workspace: Workspace
    server: str

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        env = environment(**self.workspace.env())
        env["PATH"] = f"{programs()}{os.pathsep}{env['PATH']}"
        result = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result

    def job(self, entry_point: str, *arguments: str, code: int = 0) -> str:
        """What `python -m alacarte.databricks run` says, to its end; in this process, which has the imports loaded."""
        return self.here("run", entry_point, "--experiment-name", EXPERIMENT, *arguments, code=code)

    def here(self, *arguments: str, code: int = 0) -> str:
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
            for key, value in self.workspace.env().items():
                patch.setenv(key, value)
            patch.setattr(stage, "ROOT", self.root)
            patch.setattr(databricks, "POLL_SECONDS", 0.5)
            before = signal.getsignal(signal.SIGTERM)
            mlflow.set_tracking_uri("databricks")
            try:
                ended = databricks.main(arguments)
            finally:
                signal.signal(signal.SIGTERM, before)
                mlflow.set_tracking_uri(None)
        logs = "\n".join(job.log for job in self.workspace.jobs.values())[-5000:]
        assert ended == code, f"exit code {ended}\n{output.getvalue()}\n{logs}"
        return output.getvalue()

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.server)

    def runs(self, condition: str = "") -> list:
        """All runs of the experiment, newest first."""
        matches = self.client.get_experiment_by_name(EXPERIMENT)
        ids = [matches.experiment_id] if matches else []
        return self.client.search_runs(ids, filter_string=condition, order_by=["attributes.start_time DESC"])

    def running(self) -> list:
        return self.runs("attributes.status = 'RUNNING'")
