"""Champion and challenger in MLflow's registry: registration, guarded promotion, rollback, and models by their address.

Aliases have no compare-and-set. A file lock therefore serializes the promotions of one model on one machine, every promotion
names the champion that it was decided against, and the alias is read again just before it moves.
"""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import requests
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from alacarte import verdicts
from alacarte.data import tables
from alacarte.errors import UserError, nearest
from alacarte.formats.load import read_description
from alacarte.locks import lock, user_name

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous_champion"
RUN_TAG = "retrain_run_id"  # of a version, from its first moment on: the retraining that it came from
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")  # for a missing alias or version
FORBIDDEN = "/:?#%&'\"`\\"  # a model with one of them in its name can be registered, but not read by its address


def check_name(name: object) -> None:
    """UserError for a name that cannot be registered and read again. None and an empty name mean no registry."""
    if not name:
        return
    if not isinstance(name, str) or set(name) & set(FORBIDDEN) or name != name.strip() or not name.isprintable():
        shown = " ".join(str(name).split())
        raise UserError(
            f"registered_model_name={shown} is refused: use letters, digits, dots, dashes and spaces, such as my-model, "
            f"and none of {' '.join(FORBIDDEN)}"
        )
    if mlflow.get_registry_uri().startswith("databricks-uc") and [bool(part) for part in name.split(".")] != [True] * 3:
        model = name.rpartition(".")[2] or "alacarte"
        raise UserError(
            f"registered_model_name={name} is not catalog.schema.model, as Unity Catalog requires: "
            f"use a name such as main.default.{model}"
        )


def champion_of(name: str) -> ModelVersion | None:
    """The version that serves now, or None."""
    return by_alias(name, CHAMPION)


def require_champion(name: str) -> ModelVersion:
    """The version that serves now. UserError where there is none, with the nearest names where no such model exists."""
    check_name(name)
    version = champion_of(name)
    if version is None:
        raise UserError(f"registered_model_name={name} has no champion: {nearest_models(name)}")
    return version


def number_of(version: ModelVersion | None) -> str:
    """A version's number as text ("none" for no version): stores give it as text or as an integer."""
    return str(version.version) if version else "none"


def by_alias(name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points to, or None where the alias or the model does not exist."""
    return _or_none(MlflowClient().get_model_version_by_alias, name, alias)


def by_number(name: str, version: str) -> ModelVersion | None:
    """One version by its number, or None where it does not exist."""
    return _or_none(MlflowClient().get_model_version, name, version)


def _or_none(get: Callable[[str, str], ModelVersion], name: str, version: str) -> ModelVersion | None:
    try:
        return get(name, version)
    except MlflowException as error:
        if error.error_code in ABSENT:
            return None
        raise


def nearest_models(name: str) -> str:
    """How to get a champion of a registered model, with the nearest names where there is no such model."""
    parameter = shlex.quote(f"registered_model_name={name}")
    first = f"make the first one with `mlflow run . --env-manager local -P {parameter}`"
    names = [model.name for model in MlflowClient().search_registered_models()]
    return first if name in names or not names else f"{nearest(name, names)} (or {first})"


def known_versions(name: str) -> str:
    """What `version=` can be, for an error message."""
    numbers = sorted(int(version.version) for version in MlflowClient().search_model_versions(f"name = '{name}'"))
    if not numbers:
        return f"another registered_model_name: {name} has no version"
    aliases = {"challenger": CHALLENGER, "previous": PREVIOUS}
    return ", ".join([*map(str, numbers), *(word for word, alias in aliases.items() if by_alias(name, alias))])


def is_current(name: str | None, tags: Mapping[str, str]) -> bool:
    """Whether the registry is as an evaluation left it: the same champion with its files, and its own version."""
    if not name:
        return True
    champion = champion_of(name)
    if number_of(champion) != tags.get("champion_after") or (champion and not has_files(str(champion.source))):
        return False
    return tags.get("model_version") == "none" or by_number(name, tags.get("model_version", "")) is not None


def has_files(model_uri: str) -> bool:
    """Whether the files of a logged model (`models:/m-...`) still exist."""
    try:
        files = mlflow.artifacts.list_artifacts(artifact_uri=model_uri)
    except (MlflowException, OSError):
        return False
    return any(file.path.endswith("MLmodel") for file in files or ())


def versions_of(name: str) -> list[ModelVersion]:
    """All versions of a model with their tags, which Unity Catalog leaves out of a search: there each one is read."""
    versions = list(MlflowClient().search_model_versions(f"name = '{name}'"))
    if mlflow.get_registry_uri().startswith("databricks-uc"):
        return [MlflowClient().get_model_version(name, version.version) for version in versions]
    return versions


def rejected_versions(name: str) -> list[str]:
    """The versions that the gate rejected."""
    return [number_of(version) for version in versions_of(name) if version.tags.get("gate.verdict") == "REJECT"]


def register(name: str, model_uri: str, tags: Mapping[str, object] | None = None) -> ModelVersion:
    """Make a logged model (`models:/m-...`) a version with alias `challenger`. UserError where the registry refuses the name.

    A version is there with its `tags` or not at all; one that is there already is left as it is.
    """
    client, texts = MlflowClient(), {key: str(value)[:5000] for key, value in (tags or {}).items()}
    try:
        versions = client.search_model_versions(f"name = '{name}'")
        version = next((version for version in versions if version.source == model_uri), None)
        version = version or mlflow.register_model(model_uri, name, tags=texts)
        client.set_registered_model_alias(name, CHALLENGER, version.version)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise UserError(f"registered_model_name={name} is refused: {str(error).splitlines()[0]}") from None
    return client.get_model_version(name, version.version)  # with its tags, which a search in Unity Catalog leaves out


def check_champion(name: str, expected: str) -> None:
    """UserError where another version became champion since `expected` was read."""
    number = number_of(champion_of(name))
    if number != expected:
        raise UserError(
            f"champion of {name} moved from {expected} to {number} meanwhile: nothing is changed; start again"
        )


def tag(version: ModelVersion, tags: Mapping[str, object]) -> None:
    """Write tags on a model version, as text."""
    client = MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, str(value)[:5000])


def promote(version: ModelVersion, *, expected: str, reason: str) -> None:
    """Move `champion` to a version and keep the version before it as `previous_champion`.

    `expected` is `number_of` the champion that the decision was made against. Where another promotion came first,
    nothing moves and a UserError says which. A version that is promoted again, as by a rollback, keeps the tags of its
    earlier promotions: the next tags are `promoted_at.2`, `promoted_by.2` and so on.
    """
    client, name = MlflowClient(), version.name
    with lock(f"promotion {mlflow.get_registry_uri()} {name}"):
        check_champion(name, expected)
        if expected == number_of(version):
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"promoted_at": now, "promoted_by": user_name(), "promoted_from": expected, "promotion_reason": reason}
        if expected != "none":  # first, so that a stop between the two leaves the champion where it was
            client.set_registered_model_alias(name, PREVIOUS, expected)
        client.set_registered_model_alias(name, CHAMPION, version.version)
        tags = client.get_model_version(name, version.version).tags
        times = 1 + sum(key.split(".")[0] == "promoted_at" for key in tags)
        tag(version, {key if times == 1 else f"{key}.{times}": value for key, value in about.items()})


def sign(version: ModelVersion, verdict: str, folder: Path) -> str:
    """The signature of a verdict on a version whose files in `folder` were judged."""
    return verdicts.sign(version.name, number_of(version), version.source or "", verdict, folder)


def is_signed(version: ModelVersion, folder: Path) -> bool:
    """Whether the gate signed PROMOTE for a version with the files in `folder`."""
    signature = version.tags.get(verdicts.TAG, "")
    return verdicts.is_signed(version.name, number_of(version), version.source or "", folder, signature)


def copy_to(version: ModelVersion, name: str) -> ModelVersion:
    """The copy of a version, with its verdict, under another registered model. A version is copied once."""
    client, origin = MlflowClient(), f"{version.name}/{number_of(version)}"
    copy = next((other for other in versions_of(name) if other.tags.get("copied_from") == origin), None)
    if copy is None:
        copy = client.copy_model_version(f"models:/{origin}", name)
        copy = client.get_model_version(name, copy.version)
        for key in copy.tags:  # these are about the other registered model
            if key in ("parent_version", "new_labels") or key.startswith(("promoted_", "promotion_")):
                client.delete_model_version_tag(name, copy.version, key)
        signature = verdicts.NOT_SIGNED
        if version.tags.get(verdicts.TAG, signature) != signature and os.environ.get(verdicts.KEY):
            folder = locate(f"models:/{origin}").path
            signature = sign(copy, "PROMOTE", folder) if is_signed(version, folder) else signature
        tag(copy, {"copied_from": origin, verdicts.TAG: signature})
    return client.get_model_version(name, copy.version)


def ancestry(version: ModelVersion) -> list[ModelVersion]:
    """A version and its ancestors, newest first. The list ends at a model from scratch, or before a deleted version."""
    line = [version]
    while (parent := line[-1].tags.get("parent_version")) and parent not in map(number_of, line):  # a tag can be edited
        before = by_number(version.name, parent)
        if before is None:
            break
        line.append(before)
    return line


def history(version: ModelVersion) -> str:
    """A table of `ancestry`: version -> run -> parent version -> labels, with verdicts and promotions."""
    aliases = MlflowClient().get_registered_model(version.name).aliases
    rows = [
        {
            "version": number_of(each),
            "now": ",".join(sorted(alias for alias, number in aliases.items() if str(number) == number_of(each)))
            or "-",
            "from": each.tags.get("parent_version") or each.tags.get("copied_from", "scratch"),
            "labels": each.tags.get("new_labels", "-"),
            "run_id": each.tags.get(RUN_TAG) or each.run_id or "-",
            "verdict": each.tags.get("gate.verdict", "-"),
            "promoted": each.tags.get("promoted_at", "-"),
            "by": each.tags.get("promoted_by", "-"),
        }
        for each in ancestry(version)
    ]
    note = "The labels of a retraining are the artifact feedback.json of its run, and the rows that are used there."
    return f"{version.name}\n{pd.DataFrame(rows).to_string(index=False)}\n{note}"


def pin(model_uri: str | None, name: str | None) -> tuple[str, str]:
    """The URI of one version, and its number ("none" outside the registry); without a URI, the champion of `name`.

    An alias may move while it is used; a number does not. Raises UserError where there is no such alias.
    """
    uri = str(model_uri) if model_uri else f"models:/{name}@{CHAMPION}"
    if not model_uri and not name:
        raise UserError("model_uri=null and registered_model_name=null: give one, such as -P model_uri=models:/NAME/3")
    if not (match := re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)):
        return uri, "none"
    model, alias, number = match.groups()
    if number is None:
        version = by_alias(model, alias)
        if version is None:
            raise UserError(f"model_uri={uri}: {model} has no version with alias {alias}: give {known_versions(model)}")
        number = number_of(version)
    return f"models:/{model}/{number}", number


@dataclass(frozen=True)
class Located:
    """A model on this disk."""

    uri: str  # models:/m-... for a logged model, else as asked for
    path: Path
    model_id: str | None
    run_id: str | None  # of the run that trained it
    metadata: dict[str, Any]

    def is_same(self, other: "Located") -> bool:
        """Whether both are one trained model, even if one is a copy in another place: a run of ours trains one model."""
        run_id = self.metadata.get("run_id")
        return self.uri == other.uri or (run_id is not None and run_id == other.metadata.get("run_id"))


class Unreachable(UserError):
    """The store of a model does not answer."""


def locate(model_uri: str) -> Located:
    """Find a local folder, `runs:/...`, `models:/NAME/3`, `models:/NAME@alias` or `models:/m-...` and download it.

    Raises UserError where there is no model that can be read, and Unreachable where its store does not answer. The id of a
    model is that of the address: its author may write any other one into its files.
    """
    local = Path(model_uri)
    try:
        path = local if local.is_dir() else Path(mlflow.artifacts.download_artifacts(model_uri))
        model = read_description(path)
        # the signature decides how a file is read for the model
        metadata = dict(model.metadata or {})
        metadata["column_types"] = tables.column_types(model.signature, metadata.get("target"))
        if model_uri.startswith("runs:/") and model.model_id:
            return locate(f"models:/{model.model_id}")
        model_id = None if local.is_dir() else _logged_model_id(model_uri)
    except UserError:
        raise
    except Exception as error:  # a forged file fails in all ways
        reason = " ".join(str(error).split())[:300]
        if _is_outage(error):
            raise Unreachable(f"model_uri={model_uri} cannot be downloaded now, try again: {reason}") from None
        raise UserError(f"model_uri={model_uri} is no model that can be read: {reason}") from None
    if model_id and model.model_id not in (None, model_id):
        raise UserError(
            f"model_uri={model_uri} says in its file MLmodel that it is {model.model_id}: log the model again"
        )
    uri = f"models:/{model_id}" if model_id else model_uri
    return Located(uri, path, model_id, metadata.get("run_id") or model.run_id, metadata)


def _logged_model_id(model_uri: str) -> str | None:
    """The id of a logged model by the address of the model or of its version; None for a version with another source."""
    if match := re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri):
        name, alias, number = match.groups()
        version = by_number(name, number) if number else by_alias(name, alias)
        # The source of a copy is the version that it was copied from.
        return _logged_model_id(str(version.source)) if version else None
    return model_uri.removeprefix("models:/") if re.fullmatch("models:/m-[0-9a-z]+", model_uri) else None


def _is_outage(error: BaseException | None) -> bool:
    """Whether the connection or the server failed. False if the model does not exist."""
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code >= 500
    if isinstance(error, (requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError)):
        return True
    return error is not None and _is_outage(error.__cause__ or error.__context__)
