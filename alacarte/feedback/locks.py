"""What keeps two trainings from using one label: a lease that expires, and claims that a training turns into use.

A registry and a database share no transaction. So a training first claims its labels under its run id, then registers its
version, then marks the labels used. Stopped anywhere between, it leaves claims that name its run, and whoever holds the
lease next finds out from the registry which way to go: on, where that run has a version, or back.
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
    """The turn of one process among all that share a store, renewed in the background until it is given back."""

    def __init__(self, store: Store, name: str, seconds: float) -> None:
        self.store, self.name, self.seconds = store, name, seconds
        self.holder = f"{socket.gethostname()} {_machine()} {os.getpid()} {secrets.token_hex(4)}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> str | None:
        """Take the turn and return None, or say who has it."""
        database = self.store.database
        with database.write(durable=True) as connection:
            now = database.now(connection)
            with suppress(sa.exc.IntegrityError), connection.begin_nested():
                connection.execute(leases.insert().values(name=self.name, holder="", until=0))
            found = connection.execute(sa.select(leases).where(leases.c.name == self.name).with_for_update()).one()
            if found.until > now and not _is_dead(found.holder):
                host, _, pid, _ = found.holder.split(" ")
                return f"process {pid} on {host}"
            values = {"holder": self.holder, "until": now + self.seconds}
            connection.execute(sa.update(leases).where(leases.c.name == self.name).values(values))
        self._thread.start()
        return None

    def give_back(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(StoreError):
            self._set_until(0)

    def check(self, connection: sa.Connection) -> None:
        """UserError where the turn was lost meanwhile, as after a machine that slept."""
        mine = (leases.c.name == self.name) & (leases.c.holder == self.holder)
        if connection.execute(sa.select(leases.c.until).where(mine).with_for_update()).one_or_none() is None:
            raise UserError(
                f"{self.name}: this process was away for so long that another one took its turn: run it again"
            )

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / 4):
            with suppress(StoreError):
                self._set_until(self.seconds)

    def _set_until(self, seconds: float) -> None:
        database = self.store.database
        with database.write(durable=False) as connection:
            values = {"until": database.now(connection) + seconds}
            mine = (leases.c.name == self.name) & (leases.c.holder == self.holder)
            connection.execute(sa.update(leases).where(mine).values(values))


@contextmanager
def turn(store: Store, name: str, seconds: float = 60) -> Iterator[Lease | str]:
    """A Lease on `name` while the block runs, or, where another process has it, who that is."""
    lease = Lease(store, name, seconds)
    other = lease.take()
    if other:
        yield other
        return
    try:
        yield lease
    finally:
        lease.give_back()


def claim(lease: Lease, ids: Sequence[int], run_id: str) -> list[int]:
    """Claim accepted labels for a run; those it got: all that are still accepted and nobody's."""
    free = (feedback.c.state == "accepted") & feedback.c.used_run_id.is_(None)
    got: list[int] = []
    with lease.store.database.write(durable=True) as connection:
        lease.check(connection)
        for start in range(0, len(ids), AT_ONCE):
            some = feedback.c.id.in_(list(map(int, ids[start : start + AT_ONCE]))) & free
            taken = list(connection.scalars(sa.select(feedback.c.id).where(some).with_for_update()))
            connection.execute(sa.update(feedback).where(feedback.c.id.in_(taken)).values(used_run_id=run_id))
            got += taken
    return got


def claims(store: Store, name: str) -> list[str]:
    """The runs that claimed labels of a registered model and neither used them nor gave them back."""
    query = sa.select(feedback.c.used_run_id).join_from(feedback, predictions).distinct()
    claimed = (feedback.c.state == "accepted") & feedback.c.used_run_id.is_not(None)
    with store.database.read() as connection:
        return list(connection.scalars(query.where(claimed, predictions.c.registered_model_name == name)))


def give_back(lease: Lease, run_id: str) -> None:
    """The labels that a run claimed are nobody's again."""
    _settle(lease, run_id, {"used_run_id": None})


def use(lease: Lease, run_id: str, version: str) -> None:
    """The labels that a run claimed are used by its version."""
    _settle(lease, run_id, {"state": "used", "used_version": version})


def _settle(lease: Lease, run_id: str, values: dict[str, str | None]) -> None:
    mine = (feedback.c.used_run_id == run_id) & (feedback.c.state == "accepted")
    with lease.store.database.write(durable=True) as connection:
        lease.check(connection)
        connection.execute(sa.update(feedback).where(mine).values(values))


def _machine() -> str:
    """Names the one set of process ids that this process sees; "?" where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return "?"


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process here that is gone, so that nobody waits for its lease to expire."""
    if not holder:
        return True
    _, machine, pid, _ = holder.split(" ")
    if machine == "?" or machine != _machine():
        return False
    return not Path(f"/proc/{pid}").exists()
