"""Open the tracking store, the registry and the experiment: one line within seconds if one of them does not work.

MLflow itself retries for minutes and ends in a traceback. Two processes that create the tables of one database at the same
time damage each other's migration, so processes on one machine take turns.
"""

import contextlib
import errno
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import requests
import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking.fluent import _get_experiment_id
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.databricks_utils import is_in_databricks_notebook
from mlflow.utils.rest_utils import http_request

from alacarte.errors import StoreError, UserError, first_line
from alacarte.locks import lock

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
FIXES = {  # HTTP status of a tracking server -> fix
    401: "log in with export MLFLOW_TRACKING_USERNAME=NAME MLFLOW_TRACKING_PASSWORD=PASSWORD",
    403: "log in with another MLFLOW_TRACKING_USERNAME, or ask its administrator",
    404: "correct the address, or the path in the proxy before it",
}
NO_SPACE_OR_PERMISSION = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def open_stores() -> None:
    """Check the tracking store and the registry, and create the tables of a new database.

    From here on each call to a server waits less than MLflow would: its minutes look like a step that hangs.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # seconds; read by PostgreSQL's own library
    find_relative_store()
    uris = {mlflow.get_registry_uri(): "MLFLOW_REGISTRY_URI", mlflow.get_tracking_uri(): "MLFLOW_TRACKING_URI"}
    for uri, variable in uris.items():
        setting = f"{variable}={re.sub('//[^/@]*@', '//', uri)}"
        if uri.startswith(("http://", "https://")):
            _check_server(uri, setting)
        elif uri.split("+")[0].split(":")[0] in DATABASES:
            _open_database(uri, setting)
    try:
        MlflowClient()
    except MlflowException as error:
        raise UserError(f"MLFLOW_TRACKING_URI is no store that MLflow knows: {first_line(error)}") from None


def find_relative_store() -> None:
    """Make a relative path to an SQLite store absolute, if `mlflow run` was started in another folder.

    `mlflow run /elsewhere/clone` passes such a path on to a step whose working directory is the clone.
    """
    uri, run_id = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_RUN_ID")
    name = uri.removeprefix("sqlite:///")
    if not run_id or name == uri or Path(name).is_absolute():
        return
    for folder in (Path.cwd(), *_folders_of_ancestors()):
        if _holds_run(folder / name, run_id):
            mlflow.set_tracking_uri(f"sqlite:///{folder / name}")
            return
    raise UserError(
        f"MLFLOW_TRACKING_URI={uri} is a relative path, and this folder has no such store with run {run_id}: "
        f'export MLFLOW_TRACKING_URI="sqlite:///$PWD/{name}"'
    )


def _folders_of_ancestors() -> Iterator[Path]:
    """The working directories of the process that started this one, of its parent, and so on. Linux only."""
    pid = os.getppid()
    with contextlib.suppress(OSError):  # no /proc, or a process of another account
        while pid > 1:
            yield Path(f"/proc/{pid}/cwd").readlink()
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _holds_run(database: Path, run_id: str) -> bool:
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as db,
    ):
        return bool(db.execute("select 1 from runs where run_uuid = ?", [run_id]).fetchall())
    return False


def _check_server(uri: str, setting: str) -> None:
    """UserError unless a tracking server answers as MLflow's own client, with its settings, would ask it."""
    try:
        response = http_request(
            get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search?max_results=1", "GET",
            max_retries=0, timeout=10, raise_on_status=False,
        )  # fmt: skip
    except MlflowException as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, requests.exceptions.SSLError):
            fix = "export MLFLOW_TRACKING_SERVER_CERT_PATH=FILE with the certificate of its authority"
            raise UserError(f"{setting}: the certificate of this server is not trusted: {fix}") from None
        if isinstance(cause, requests.exceptions.ReadTimeout):  # slow, but there
            return
        if isinstance(cause, requests.exceptions.ConnectionError):
            raise UserError(f"{setting} does not answer: start the server, or unset {setting.split('=')[0]}") from None
        raise UserError(f"{setting} cannot be used: {first_line(error)}") from None
    is_json = response.headers.get("Content-Type", "").startswith("application/json")
    if response.status_code != 200 or not is_json:
        reason = first_line(response.text)[:200] if response.text and "<" not in response.text else response.reason
        default = "read the log of the server, or try again later" if response.status_code >= 500 else FIXES[404]
        fix = FIXES.get(response.status_code, default)
        raise UserError(f"{setting} is no MLflow server that works, HTTP {response.status_code} {reason}: {fix}")


def _open_database(uri: str, setting: str) -> None:
    """Connect once, without MLflow's retries, and create the tables. UserError if that is not possible."""
    path = Path(uri.removeprefix("sqlite:///"))
    try:
        if uri.startswith("sqlite:///"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, "no permission to write it")
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        with engine.connect():
            pass
        with lock(f"store {uri}"):
            MlflowClient(uri)
    except UserError:  # of the lock
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{setting} needs a package: pip install {error.name}") from None
    except Exception as error:  # each driver, SQLAlchemy, Alembic and MLflow have classes of their own
        reason = first_line(getattr(error, "orig", None) or error)
        raise UserError(f"{setting} cannot be opened: {reason}: correct the address, or start the database") from None


# --- the experiment --------------------------------------------------------------------------------------------------


def use_experiment(name: str | None) -> None:
    """Make an experiment the active one, and create it if it is new; without a name, MLflow's choice.

    UserError for a deleted experiment, and on Databricks for no experiment or a name that is no path.
    """
    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if mlflow.get_tracking_uri().startswith("databricks"):
        is_known = name or os.environ.get("MLFLOW_EXPERIMENT_ID") or is_in_databricks_notebook()
        if not is_known or (name and not name.startswith("/")):
            path = f"/Shared/{name or 'alacarte'}"
            raise UserError(f"experiment_name={name or 'null'}: Databricks asks for a path, such as {path}")
    client = MlflowClient()
    try:
        experiment = client.get_experiment_by_name(name) if name else client.get_experiment(str(_get_experiment_id()))
        if name and experiment is None:
            with contextlib.suppress(MlflowException):  # another process created it a moment ago
                client.create_experiment(name)
            experiment = client.get_experiment_by_name(name) or client.get_experiment(client.create_experiment(name))
    except MlflowException as error:
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            raise
        raise UserError(f"experiment_name={name or 'null'} cannot be used: {first_line(error)}") from None
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        command = f"{program('mlflow')} experiments restore --experiment-id {experiment.experiment_id}"
        raise UserError(f"experiment {experiment.name} is deleted: {command}, or choose another experiment_name")
    mlflow.set_experiment(experiment_id=experiment.experiment_id)


def program(name: str) -> str:
    """A program of this environment, as one types it in this folder, whether or not the environment is active."""
    command = Path(sys.executable).with_name(name)
    return shlex.quote(str(command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command))


# --- failures later on -----------------------------------------------------------------------------------------------


def explain_failure(error: BaseException) -> str | None:
    """One line for a failure that is no fault of the program: a store that went away, a full disk, no permission."""
    if isinstance(error, StoreError):
        return f"the feedback store does not work: {error}"
    cause = error.__cause__ if isinstance(error, MlflowException) else error
    if isinstance(cause, sqlalchemy.exc.DBAPIError):
        return f"the tracking store does not work: {first_line(cause.orig or cause)}"
    if isinstance(error, MlflowException):
        text = first_line(error)
        is_away = error.error_code in ("TEMPORARILY_UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED")
        return f"the tracking store does not work: {text}" if is_away or text.startswith("API request to ") else None
    if isinstance(error, OSError) and error.errno in NO_SPACE_OR_PERMISSION:
        return f"{error.strerror}: {error.filename or 'a file of this run'}"
    return None
