"""Python programs without their imports, which cost several times more than a small step.

A server loads the packages once. `programs` makes a folder for PATH with programs like `python`, which ask the server to
fork. The forked process has the folder, environment, streams and arguments of the caller, and loads the modules of the project
by itself.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path

PACKAGES = (
    "fastapi", "hydra", "keras", "lightgbm", "matplotlib.pyplot", "mlflow.cli", "mlflow.projects", "mlflow.sklearn",
    "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store", "prometheus_client",
    "pyarrow.parquet", "scipy.stats", "sklearn.compose", "sklearn.ensemble", "sklearn.linear_model", "sklearn.metrics",
    "sklearn.neural_network", "sklearn.pipeline", "skops.io", "torch", "uvicorn", "xgboost",
)  # fmt: skip
SCRIPT = """#!/bin/sh
case "{module} $1 $2" in
  " - "*|" -c "*|" -P "*|" "*".py "*|*"-m mlflow"*|*"-m uvicorn"*|*"-m alacarte"*|\\
  " -m steps."*|" -m examples."*|" -m driver"*|" -m interrupted"*)
    exec {python} -S -E {file} {socket} {module} "$@";;
  *) exec {program} "$@";;
esac
"""


@cache
def programs(python: str = sys.executable) -> str:
    """A folder with the programs `python`, `mlflow`, `uvicorn` and `alacarte`. Its server ends with this process."""
    own = Path(python).parent
    if sys.platform != "linux":
        return str(own)
    folder = Path(tempfile.mkdtemp(prefix="preloaded"))
    address = folder / "socket"
    for name in ("python", "mlflow", "uvicorn", "alacarte"):
        module = "" if name == "python" else f"-m {name}"
        names = {"python": python, "file": __file__, "socket": address, "module": module, "program": own / name}
        (folder / name).write_text(SCRIPT.format(**names))
        (folder / name).chmod(0o755)
    env = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KERAS_BACKEND": "torch",
    }  # as alacarte/__init__.py
    server = subprocess.Popen([python, __file__, str(address)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout and server.stdout.readline() == b"ready\n"
    atexit.register(server.terminate)
    return str(folder)


def ask(address: str, arguments: Sequence[str]) -> int:
    """Let the server run `python arguments`, pass signals on, and return the exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        order = json.dumps([str(Path.cwd()), list(arguments), dict(os.environ)]).encode()
        socket.send_fds(server, [len(order).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(order)
        answers = server.makefile()
        pid = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: os.kill(pid, received))
        return int(answers.readline())


def serve(address: str) -> None:
    """Load the packages, and fork for each call. Returns in the forked processes only."""
    for name in PACKAGES:
        __import__(name)
    requirements = sys.modules["mlflow.utils.requirements_utils"]
    requirements._init_modules_to_packages_map()  # as the first log_model does: a second
    gc.freeze()  # a collection in a forked process would copy these objects
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait for a step
        print("ready", flush=True)
        while True:
            readable = select.select([listener, 0], [], [])[0]
            if 0 in readable:  # the process of the tests has ended
                sys.exit()
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    with connection:
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as orders:
            order = json.loads(orders.read(int.from_bytes(size, "big")))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if pid := os.fork():
            wait_for(pid, connection)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
    run(*order)


def wait_for(pid: int, connection: socket.socket) -> None:
    """Send the number of a process, and later its exit code. If the caller has been killed, end the process."""
    ended = os.pidfd_open(pid)
    for number in range(3):
        os.close(number)
    with contextlib.suppress(BrokenPipeError):  # a caller that was killed before it has the number
        connection.sendall(f"{pid}\n".encode())
    if ended not in select.select([connection, ended], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def run(folder: str, arguments: Sequence[str], env: dict[str, str]) -> None:
    """`python arguments` in this process, which then ends as a forked process of multiprocessing does: the interpreter would
    otherwise delete all objects of the packages, for which it must copy their memory first."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:1] = [folder, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.stdout.reconfigure(line_buffering="PYTHONUNBUFFERED" in env)  # type: ignore[union-attr]
    code: object = 1
    try:
        run_program(folder, arguments[0], arguments[1:])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def run_program(folder: str, first: str, rest: Sequence[str]) -> None:
    """`python -m MODULE`, `python -c CODE`, `python -`, `python FILE` or, without its folder in `sys.path`, `python -P FILE`."""
    if first == "-P":
        sys.path.remove(folder)
        first, *rest = rest
    if first == "-m":
        if rest[0] == "mlflow":  # it runs `python -m uvicorn`
            sys.executable = str(Path(sys.argv[1]).with_name("python"))
        sys.argv[1:] = rest[1:]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-", "-c"):
        code, *arguments = (sys.stdin.read(), *rest) if first == "-" else rest
        sys.argv = [first, *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        status = ask(sys.argv[1], sys.argv[2:])
        sys.exit(status if status >= 0 else 128 - status)
    serve(sys.argv[1])
