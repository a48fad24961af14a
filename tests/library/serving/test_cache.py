"""The last versions on disk: what is kept, what is damaged, and a restart without the registry."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import tracking
from registries import Registry, answers, following, load, own_registry, point, refuses, register, serves, until

from alacarte.errors import UserError
from alacarte.serving.follower import ModelFollower
from alacarte.serving.model import ServedModel


@pytest.fixture
def follow(server: str, tmp_path: Path) -> Iterator[Callable[..., ModelFollower]]:
    with tracking(server), following(tmp_path / "cache") as start:
        yield start


def folder_of(cache: Path) -> Path:
    [folder] = cache.iterdir()
    return folder


def test_the_cache_keeps_few_and_mends_what_is_damaged(follow, tmp_path: Path):
    for label in range(1, 7):
        register("few", label)
    for version in "123456":
        point("few", version)
        holder = holder if version > "1" else follow("few")  # noqa: F821
        serves(holder, version)
    folder = folder_of(tmp_path / "cache")
    until(lambda: sorted(path.name[0] for path in folder.iterdir()) == ["4", "5", "6"])
    (killed := folder / ".new-killed").mkdir()
    os.utime(killed, (0, 0))
    point("few", "5")
    serves(holder, "5")
    until(lambda: not killed.exists())
    holder.stop()
    point("few", "6")
    [copy] = folder.glob("6-*")
    (copy / "model/model.skops").write_bytes(b"damaged")
    again = follow("few")
    serves(again, "6")
    assert answers(again) == 6 and (copy / "model/model.skops").read_bytes() != b"damaged"


@pytest.fixture
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with own_registry(tmp_path_factory.mktemp("registry")) as made:
        yield made


def test_with_the_registry_down(follow, tmp_path: Path, registry: Registry, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for label in (1, 2):
        register("down", label)
    point("down", "1")
    holder = follow("down")
    serves(holder, "1")

    registry.stop()
    until(lambda: "does not answer" in (holder.status()["last_error"] or ""), holder.status)
    assert answers(holder) == 1
    restarted = follow("down")
    serves(restarted, "1")
    assert answers(restarted) == 1 and "does not answer" in restarted.status()["last_error"]
    until(lambda: restarted.status()["path"] != "pyfunc")

    folder = folder_of(tmp_path / "cache")
    [model] = folder.glob("1-*/model")
    origin = model.parent / "version.json"
    text, whole = origin.read_text(), tmp_path / "whole"
    shutil.copytree(model.parent, whole)

    def refused() -> None:
        alone = follow("down")
        until(lambda: "is damaged" in alone.reason(), alone.reason)
        assert alone.current is None and "does not answer" in alone.reason() and "\n" not in alone.reason()
        alone.stop()

    (model / "model.skops").write_bytes((model / "model.skops").read_bytes()[:-9])
    refused()
    (model / "model.skops").unlink()
    refused()
    shutil.rmtree(model)
    refused()
    shutil.rmtree(model.parent)
    shutil.copytree(whole, model.parent)
    for half in (text[:40], "", "{}", "[1]"):
        origin.write_text(half)
        refused()
    (model.parent / "served").unlink()
    alone = follow("down")
    until(lambda: "no other version has served" in alone.reason(), alone.reason)

    registry.start()
    point("down", "2")
    for each in (holder, restarted, alone):
        serves(each, "2")
        until(lambda each=each: each.status()["last_error"] is None, each.status)


def test_where_the_last_version_that_served_is_refused_the_one_before_serves(follow):
    refused: set[str] = set()

    def choosy(folder: Path) -> ServedModel:
        if (number := folder.parent.name.split("-")[0]) in refused:
            raise UserError(f"{folder}: version {number} is not what it was")
        return load(folder)

    for label in (1, 2, 3):
        register("worse", label)
    holder = follow("worse", choosy)
    for version in "132":
        point("worse", version)
        serves(holder, version)
    holder.stop()
    refused.add("2")
    restarted = follow("worse", choosy)
    serves(restarted, "3")
    reason = refuses(restarted, "2", kept="3")
    assert reason == "version 2 is refused: version 2 is not what it was"
    restarted.stop()
    refused |= {"1", "3"}
    alone = follow("worse", choosy)
    until(lambda: "the copy of version 1 is refused" in alone.reason(), alone.reason)
    assert alone.current is None and "the copy of version 2" not in alone.reason()
