"""A real PostgreSQL for a test: a cluster of its own in a temporary folder, reached through a socket there."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from parts import need

USER = "postgres"


class Postgres:
    """A cluster that can be stopped and started. `create` makes an empty database and gives its URL."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder, self._made = programs, folder, 0
        self.data = folder / "data"

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        if os.geteuid() == 0:  # which PostgreSQL refuses
            command = ["runuser", "-u", USER, "--", *command]
        with (self._folder / "log").open("ab") as log:  # a pipe would stay open for as long as the server runs
            result = subprocess.run(
                command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60
            )
        if result.returncode:
            pytest.fail(f"{' '.join(command)}\n{(self._folder / 'log').read_text(errors='replace')}")

    def start(self) -> None:
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off -c max_connections=50"
        self.run("pg_ctl", "start", "-w", "-D", str(self.data), "-o", options)

    def stop(self) -> None:
        """At once, connections or not."""
        self.run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", str(self.data))

    def create(self) -> str:
        self._made += 1
        self.run("createdb", "-h", str(self._folder), "-U", USER, f"test{self._made}")
        return f"postgresql+psycopg://{USER}@/test{self._made}?host={self._folder}"


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Where PostgreSQL is not installed, parts.need decides."""
    initdb = Path(need("initdb", "postgresql")).resolve()
    folder = Path(tempfile.mkdtemp(prefix="postgres"))  # short, as a socket's path must be, and open to another user
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, USER)
        server = Postgres(initdb.parent, folder)
        server.run("initdb", "--no-sync", "-U", USER, "-A", "trust", "-E", "UTF8", "-D", str(server.data))
        server.start()
        try:
            yield server
        finally:
            if (server.data / "postmaster.pid").exists():
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
