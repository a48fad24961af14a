"""A lock that expires, and claims on labels, so that no two trainings use the same label.

A registry and a database share no transaction. So a training first claims its labels under its run id, then registers its
version, then marks the labels as used. If it is killed in between, its claims remain and name its run. The next process that
gets the lock asks the registry: if that run has a version, the labels become used, otherwise they are released.
"""

import os
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa

from alacarte.errors import StoreError, UserError
from alacarte.feedback.database import feedback, leases, predictions
from alacarte.feedback.store import Store

AT_ONCE = 500  # labels in one statement


class Lease:
    """The lock on one registered model among all processes that share a store, renewed until it is released."""

    def __init__(self, store: Store, name: str, seconds: float) -> None:
        self.store, self.name, self.seconds = store, name, seconds
        self.holder = f"{socket.gethostname()} {_machine()} {os.getpid()} {secrets.token_hex(4)}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self) -> str | None:
        """Take the lock and return None, or say which process has it."""
        database = self.store.database
        with database.write(durable=True) as connection:
            now = database.now(connection)
            with suppress(sa.exc.IntegrityError), connection.begin_nested():
                connection.execute(leases.insert().values(name=self.name, holder="", until=0))
            row = connection.execute(sa.select(leases).where(leases.c.name == self.name).with_for_update()).one()
            if row.until > now and not _is_dead(row.holder):
                host, _, pid, _ = row.holder.split(" ")
                return f"process {pid} on {host}"
            values = {"holder": self.holder, "until": now + self.seconds}
            connection.execute(sa.update(leases).where(leases.c.name == self.name).values(values))
        self._thread.start()
        return None

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(StoreError):
            self._set_until(0)

    def check(self, connection: sa.Connection) -> None:
        """UserError where the lock was lost, for example because the machine slept."""
        query = sa.select(leases.c.until).where(self._is_mine()).with_for_update()
        if connection.execute(query).one_or_none() is None:
            raise UserError(f"{self.name}: another process took the lock, this one stood still too long: run it again")

    def _is_mine(self) -> sa.ColumnElement[bool]:
        return (leases.c.name == self.name) & (leases.c.holder == self.holder)

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / 4):
            with suppress(StoreError):
                self._set_until(self.seconds)

    def _set_until(self, seconds: float) -> None:
        database = self.store.database
        with database.write(durable=False) as connection:
            until = database.now(connection) + seconds
            connection.execute(sa.update(leases).where(self._is_mine()).values(until=until))


@contextmanager
def lock(store: Store, name: str, seconds: float = 60) -> Iterator[Lease | str]:
    """The lock on registered model `name` while the block runs, or, where another process has it, which one."""
    lease = Lease(store, name, seconds)
    other = lease.acquire()
    if other:
        yield other
        return
    try:
        yield lease
    finally:
        lease.release()


def claim(lease: Lease, ids: Sequence[int], run_id: str) -> list[int]:
    """Claim accepted labels of the locked model for a run; the ids of those that no other run has claimed."""
    free = (feedback.c.state == "accepted") & feedback.c.used_run_id.is_(None) & _of_model(lease.name)
    claimed: list[int] = []
    with lease.store.database.write(durable=True) as connection:
        lease.check(connection)
        for start in range(0, len(ids), AT_ONCE):
            some = feedback.c.id.in_(list(map(int, ids[start : start + AT_ONCE]))) & free
            part = list(connection.scalars(sa.select(feedback.c.id).where(some).with_for_update()))
            connection.execute(sa.update(feedback).where(feedback.c.id.in_(part)).values(used_run_id=run_id))
            claimed += part
    return claimed


def claims(store: Store, name: str) -> list[str]:
    """The runs that claimed labels of a registered model and neither used nor released them."""
    claimed = (feedback.c.state == "accepted") & feedback.c.used_run_id.is_not(None) & _of_model(name)
    with store.database.read() as connection:
        return list(connection.scalars(sa.select(feedback.c.used_run_id).distinct().where(claimed)))


def give_back(lease: Lease, run_id: str) -> None:
    """No run has claimed the labels of this run any more."""
    _change_claims(lease, run_id, {"used_run_id": None})


def use(lease: Lease, run_id: str, version: str) -> None:
    """The labels that a run claimed are used by its version."""
    _change_claims(lease, run_id, {"state": "used", "used_version": version})


def _change_claims(lease: Lease, run_id: str, values: dict[str, str | None]) -> None:
    claimed = (feedback.c.used_run_id == run_id) & (feedback.c.state == "accepted") & _of_model(lease.name)
    with lease.store.database.write(durable=True) as connection:
        lease.check(connection)
        connection.execute(sa.update(feedback).where(claimed).values(values))


def _of_model(name: str) -> sa.ColumnElement[bool]:
    """Whether a label belongs to a prediction of a registered model."""
    return sa.exists().where(predictions.c.id == feedback.c.prediction_id, predictions.c.registered_model_name == name)


def _machine() -> str:
    """Names the one set of process ids that this process sees; "?" where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return "?"


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process of this machine that has ended, so that no other waits for its lock to expire."""
    if not holder:
        return True
    _, machine, pid, _ = holder.split(" ")
    if machine == "?" or machine != _machine():
        return False
    return not Path(f"/proc/{pid}").exists()
