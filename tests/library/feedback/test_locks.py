"""Locks, and claims on labels: the same on SQLite and PostgreSQL, between real processes."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import ROOT, environment
from stores import NAME, give, predict

from alacarte.errors import UserError
from alacarte.feedback import Store
from alacarte.feedback.locks import Lock, claim, claims, give_back, lock, use

HOLD = """
import sys
from alacarte.feedback import Store
from alacarte.feedback.locks import lock
with lock(Store(sys.argv[1]), "digits") as model_lock:
    print("none" if model_lock is None else "mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url, timeout=3)
    yield opened
    opened.close()


def other_process(url: str) -> subprocess.Popen[str]:
    """A process that takes the lock and keeps it until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, url], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "mine\n"
    return process


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_one_process_at_a_time(store: Store, url: str, end: str):
    process = other_process(url)
    with lock(store, NAME) as model_lock:
        assert model_lock is None
    with lock(store, "another") as model_lock:
        assert isinstance(model_lock, Lock)
    if end == "ends":
        process.communicate("")
    else:
        process.kill()
        process.wait()
    with lock(store, NAME) as model_lock:
        assert isinstance(model_lock, Lock)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_server_that_was_restarted(store: Store, url: str, postgres):
    """The lock is taken again, unless another process has it now. SQLite has no server that could lose a lock."""
    rows = predict(store, [1, 2])
    for row in rows:
        give(store, row, 0)
    first, second = store.accepted(NAME).about["feedback_id"]
    with lock(store, NAME) as model_lock:
        assert claim(model_lock, [first], "one") == [first]
        postgres.stop()
        postgres.start()
        use(model_lock, "one", "2")
        assert store.labelled(NAME, "used").about["feedback_id"].tolist() == [first]
        assert claim(model_lock, [second], "two") == [second]
        postgres.stop()
        postgres.start()
        process = other_process(url)
        with pytest.raises(UserError, match="another process took the lock"):
            use(model_lock, "two", "3")
        process.communicate("")
    assert store.accepted(NAME).about["feedback_id"].tolist() == [second]


def test_claims_become_use_or_are_given_back(store: Store):
    rows = predict(store, [1, 2, 3])
    for row in rows:
        give(store, row, 0)
    first, second, third = store.accepted(NAME).about["feedback_id"]
    with lock(store, NAME) as model_lock:
        assert claim(model_lock, [first, second], "one") == [first, second]
        assert claim(model_lock, [first, third], "two") == [third]  # a claimed label belongs to one run
        assert sorted(claims(store, NAME)) == ["one", "two"] and claims(store, "another") == []
        give_back(model_lock, "two")
        store.review(NAME, rows[1], accept=False)  # an administrator may still reject it
        use(model_lock, "one", "7")
    about = store.labelled(NAME, "accepted", "used", "rejected").about.set_index("feedback_id")
    assert about["state"].to_dict() == {first: "used", second: "rejected", third: "accepted"}
    assert about.loc[first, ["used_run_id", "used_version"]].tolist() == ["one", "7"]
    assert about["used_run_id"].isna().to_dict() == {first: False, second: False, third: True}
    assert claims(store, NAME) == []
