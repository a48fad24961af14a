"""Locks, and claims on labels: the same on SQLite and PostgreSQL, between real processes."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from conftest import ROOT, environment
from test_store import give, predict

from alacarte.errors import UserError
from alacarte.feedback import Store
from alacarte.feedback.database import leases
from alacarte.feedback.locks import Lease, claim, claims, give_back, lock, use

NAME = "digits"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    made = Store(url, timeout=3)
    yield made
    made.close()


HOLD = """
import sys, time
from alacarte.feedback import Store
from alacarte.feedback.locks import lock
with lock(Store(sys.argv[1]), "digits", 2) as lease:
    print(lease if isinstance(lease, str) else "mine", flush=True)
    sys.stdin.read()
"""


def other(url: str) -> subprocess.Popen[str]:
    """A process that takes the lock and keeps it until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, url], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_one_process_at_a_time(store: Store, url: str):
    process = other(url)
    assert process.stdout.readline() == "mine\n"
    time.sleep(2.5)  # longer than the lease lasts without being renewed
    with lock(store, "digits") as lease:
        assert isinstance(lease, str) and str(process.pid) in lease
    with lock(store, "another") as lease:
        assert isinstance(lease, Lease)
    process.communicate("")
    with lock(store, "digits") as lease:
        assert isinstance(lease, Lease)


def test_nobody_waits_for_a_process_that_was_killed(store: Store, url: str):
    process = other(url)
    assert process.stdout.readline() == "mine\n"
    process.kill()
    process.wait()
    with lock(store, "digits") as lease:
        assert isinstance(lease, Lease)


def test_a_process_of_another_machine_is_waited_for_until_its_lease_ends(store: Store):
    with store.database.write(durable=True) as connection:
        until = store.database.now(connection) + 0.6
        connection.execute(leases.insert().values(name="digits", holder="far machine 1 ab", until=until))
    with lock(store, "digits") as lease:
        assert lease == "process 1 on far"
    time.sleep(0.7)
    with lock(store, "digits") as lease:
        assert isinstance(lease, Lease)


def test_a_process_that_lost_the_lock_changes_nothing(store: Store):
    (row,) = predict(store, [1])
    give(store, row, 2)
    (ident,) = store.accepted(NAME).about["feedback_id"]
    with lock(store, "digits") as lease:
        assert claim(lease, [ident], "run") == [ident]
        with store.database.write(durable=True) as connection:  # as if this machine had slept
            connection.execute(sa.update(leases).values(holder="far machine 1 ab"))
        with pytest.raises(UserError, match="took the lock"):
            use(lease, "run", "2")
    assert store.accepted(NAME).about["feedback_id"].tolist() == [ident]


def test_claims_become_use_or_are_given_back(store: Store):
    rows = predict(store, [1, 2, 3])
    for row in rows:
        give(store, row, 0)
    first, second, third = store.accepted(NAME).about["feedback_id"]
    with lock(store, "digits") as lease:
        assert claim(lease, [first, second], "one") == [first, second]
        assert claim(lease, [first, third], "two") == [third]  # what is claimed is nobody else's
        assert sorted(claims(store, NAME)) == ["one", "two"] and claims(store, "another") == []
        give_back(lease, "two")
        store.review(NAME, rows[1], accept=False)  # an administrator may still say no
        use(lease, "one", "7")
    about = store.labelled(NAME, "accepted", "used", "rejected").about.set_index("feedback_id")
    assert about["state"].to_dict() == {first: "used", second: "rejected", third: "accepted"}
    assert about.loc[first, ["used_run_id", "used_version"]].tolist() == ["one", "7"]
    assert about["used_run_id"].isna().to_dict() == {first: False, second: False, third: True}
    assert claims(store, NAME) == []
