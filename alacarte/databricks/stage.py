"""Make the folder for a Databricks job from the files that git knows, and read the specification of its cluster.

MLflow has two ways to run a project there. Only `databricks_spark_job` works on today's runtimes. It must be the only
environment in an MLproject, and MLflow uploads the whole folder of that file. So a second folder is made, with the same entry
points and the same pins, and with nothing that belongs to this machine.
"""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from alacarte.errors import UserError
from alacarte.folders import ROOT as ROOT

STAGED = "build/databricks"
LARGEST = 1_000_000  # bytes of one file
DATA = re.compile(r"\.(db|sqlite3?|duckdb|csv|tsv|parquet|pq|feather|arrow|xlsx?)(\.(gz|bz2|xz|zip))?$", re.I)
SECRET_NAMES = re.compile(
    r"(^|/)(\.env(\..+)?|\.netrc|\.databrickscfg|id_(rsa|ed25519|ecdsa)|.+\.(pem|key|p12|pfx))$", re.I
)
SECRETS = re.compile(rb"dapi[0-9a-f]{32}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|-----BEGIN [A-Z ]*PRIVATE KEY-----")
ENVIRONMENTS = ("python_env", "conda_env", "docker_env")  # which databricks_spark_job refuses beside it
CLUSTER = {"python_version": "3.12", "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
NOT_IN_CLUSTER = (
    "new_cluster",
    "existing_cluster_id",
    "libraries",
)  # MLflow starts a new cluster with the pins for each run
REQUIRED_IN_CLUSTER = (("spark_version",), ("node_type_id", "instance_pool_id"), ("num_workers", "autoscale"))
BOOT = "databricks/boot.py"
NOT_THERE = "serve"  # no request would reach a job


def stage(root: Path, commit: Mapping[str, str]) -> list[str]:
    """Make `build/databricks` in the project at `root` anew; return the names of the data files that were left out.

    `commit` holds the git tags for runs of the folder, because there is no git on a cluster (`source.git_tags`).
    Raises UserError, and leaves the folder as it was, for files that must not leave this machine or are too large.
    """
    files, left_out = _files_to_stage(root)
    target = root / STAGED
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary, target.name)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
        text = yaml.safe_dump(spark_project(root), sort_keys=False, width=1000)
        (folder / "MLproject").write_text(f"# Made from MLproject and requirements.txt by `make databricks`.\n{text}")
        (folder / "git_tags.json").write_text(json.dumps(commit))
        if target.exists():
            target.rename(Path(temporary, "old"))
        folder.rename(target)
    return left_out


def _files_to_stage(root: Path) -> tuple[list[str], list[str]]:
    """The files that git knows, without data files, and those data files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        raise UserError(f"{root} is no git checkout, and only files in git go to Databricks: `git init; git add .`")
    files = [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]
    left_out = [name for name in files if DATA.search(name)]
    files = [name for name in files if name not in left_out]
    for name in files:
        _check_file(root, name)
    if BOOT not in files:
        raise UserError(f"{BOOT} is not in git: `git add {BOOT}`")
    return files, left_out


def _check_file(root: Path, name: str) -> None:
    """UserError for a link out of the project, a secret or a large file."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{name} is a link that leads out of the project: replace it by the file itself")
    if SECRET_NAMES.search(name):
        raise UserError(f"{name} is in git and by its name a secret: `git rm --cached {name}`, and make a new secret")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{name} has {size:,} bytes, allowed are {LARGEST:,}: put it into a volume of the workspace")
    if secret := SECRETS.search(path.read_bytes()):
        start = secret[0][:8].decode()
        raise UserError(f"{name} contains what looks like a secret, {start}...: remove it, and make a new secret")


def spark_project(root: Path) -> dict[str, Any]:
    """MLproject as a `databricks_spark_job`: the same entry points behind the boot script, the pins as libraries."""
    project = yaml.safe_load((root / "MLproject").read_text())
    entries = {
        name: {**entry, "command": _command(name, entry["command"])} for name, entry in entry_points(root).items()
    }
    rest = {key: value for key, value in project.items() if key not in (*ENVIRONMENTS, "entry_points")}
    return {**rest, "databricks_spark_job": {"python_libraries": libraries(root)}, "entry_points": entries}


def _command(name: str, command: str) -> str:
    if not command.startswith("python -m "):
        raise UserError(
            f"MLproject: entry point {name} is `{command}`: on Databricks it must be `python -m MODULE ...`"
        )
    return f"python {BOOT} {command.removeprefix('python -m ')}"


def entry_points(root: Path) -> dict[str, dict[str, Any]]:
    """The entry points of MLproject that run as a job."""
    entries = yaml.safe_load((root / "MLproject").read_text())["entry_points"]
    return {name: entry for name, entry in entries.items() if name != NOT_THERE}


def libraries(root: Path) -> list[str]:
    """The lines of requirements.txt that Linux needs, as the libraries of a cluster."""
    lines = [line.split("#")[0].strip() for line in (root / "requirements.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    return [f"{r.name}{r.specifier}" for r in requirements if r.marker is None or r.marker.evaluate(CLUSTER)]


# --- the cluster -----------------------------------------------------------------------------------------------------


def read_cluster(path: str | Path) -> dict[str, Any]:
    """The flat specification of a new cluster. UserError for a file that MLflow cannot use."""
    where = f"--backend-config {path}"
    try:
        cluster = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read: {error}: see databricks/cluster.json") from None
    if not isinstance(cluster, dict):
        raise UserError(f"{where} holds {type(cluster).__name__}: give one object, see databricks/cluster.json")
    for key in NOT_IN_CLUSTER:
        if key in cluster:
            raise UserError(f"{where}: {key} is not allowed: describe one new cluster, as databricks/cluster.json does")
    for keys in REQUIRED_IN_CLUSTER:
        if all(cluster.get(key) in (None, "") for key in keys):
            raise UserError(f"{where}: {' or '.join(keys)} is missing: see databricks/cluster.json")
    return cluster
