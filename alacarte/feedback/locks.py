"""One retraining of a model at a time, and claims on labels, so that no two trainings use the same label.

A registry and a database share no transaction. So a training first claims its labels under its run id, then registers its
version, then marks the labels as used. If it is killed in between, its claims remain and name its run. The next process that
gets the lock asks the registry: if that run has a version, the labels become used, otherwise they are released.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import filelock
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from alacarte.errors import UserError
from alacarte.feedback.database import feedback
from alacarte.feedback.store import Store

CLAIM_LABELS = 500  # in one statement


class Lock:
    """The lock on one registered model among all processes that share a store. It ends with the process that has it.

    For SQLite it is a lock on a file beside the database, for PostgreSQL an advisory lock of a connection that stays open.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self._database = store, name, store.database
        digest = hashlib.sha256(name.encode()).digest()
        if self._database.is_sqlite:
            path = self._database.path
            self._file = filelock.FileLock(f"{path}.{digest.hex()[:16]}.lock", mode=path.stat().st_mode & 0o777)
        else:
            self._query = sa.select(sa.func.pg_try_advisory_lock(int.from_bytes(digest[:8], signed=True)))
            with self._database.errors():
                session = self._database.engine.connect()
            self._session = session.execution_options(isolation_level="AUTOCOMMIT")

    def acquire(self) -> bool:
        """Whether this process has the lock now. A process that has it gets it again."""
        if self._database.is_sqlite:
            try:
                return bool(self._file.acquire(timeout=0))
            except filelock.Timeout:
                return False
        with self._database.errors():
            try:
                return self._session.execute(self._query).scalar_one()
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            self._session.rollback()  # the server was restarted: the next statement opens another session
            return self._session.execute(self._query).scalar_one()

    def release(self) -> None:
        if self._database.is_sqlite:
            self._file.release(force=True)
        else:
            self._session.invalidate()  # closes the session, which would keep the lock in the pool
            self._session.close()


@contextmanager
def lock(store: Store, name: str) -> Iterator[Lock | None]:
    """The lock on a registered model while the block runs, or None if another process has it."""
    model_lock = Lock(store, name)
    try:
        yield model_lock if model_lock.acquire() else None
    finally:
        model_lock.release()


def claim(model_lock: Lock, ids: Sequence[int], run_id: str) -> list[int]:
    """Claim accepted labels of the locked model for a run; the ids of those that no other run has claimed."""
    free = (feedback.c.state == "accepted") & feedback.c.used_run_id.is_(None)
    claimed: list[int] = []
    with model_lock.store.database.write(durable=True) as connection:
        for start in range(0, len(ids), CLAIM_LABELS):
            chunk = feedback.c.id.in_(list(map(int, ids[start : start + CLAIM_LABELS])))
            change = sa.update(feedback).where(chunk & free).values(used_run_id=run_id).returning(feedback.c.id)
            claimed += connection.scalars(change)
    return claimed


def claims(store: Store, name: str) -> list[str]:
    """The runs that claimed labels of a registered model and neither used nor released them."""
    claimed = (feedback.c.state == "accepted") & feedback.c.used_run_id.is_not(None)
    is_of_model = feedback.c.registered_model_name == name
    with store.database.read() as connection:
        return list(connection.scalars(sa.select(feedback.c.used_run_id).distinct().where(claimed & is_of_model)))


def give_back(model_lock: Lock, run_id: str) -> None:
    """Release the claims of a run."""
    _change_claims(model_lock, run_id, {"used_run_id": None})


def use(model_lock: Lock, run_id: str, version: str) -> None:
    """Mark the labels that a run claimed as used by its version."""
    _change_claims(model_lock, run_id, {"state": "used", "used_version": version})


def _change_claims(model_lock: Lock, run_id: str, values: dict[str, str | None]) -> None:
    claimed = (feedback.c.used_run_id == run_id) & (feedback.c.state == "accepted")
    with model_lock.store.database.write(durable=True) as connection:
        changed = connection.execute(sa.update(feedback).where(claimed).values(values))
        if not model_lock.acquire() or not changed.rowcount:
            raise UserError(f"{model_lock.name}: another process took the lock: run it again")
