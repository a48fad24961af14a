"""promote: move the alias `champion` by hand, to a chosen version or back to the previous one.

    mlflow run . -e promote --env-manager local -P version=previous
    python -m steps.promote version=3 force=true reason="passed the review"
    python -m steps.promote version=champion to=prod.models.churn
    python -m steps.promote history=true

Result: the moved aliases, tags on the version with who, when and why, and a run that records the promotion. history=true changes
nothing. It prints the history of the champion, or of `version`.
"""

import mlflow
from mlflow.entities.model_registry import ModelVersion
from omegaconf import DictConfig

from alacarte import launch, registry, tracking
from alacarte.errors import UserError

ALIASES = {"champion": registry.CHAMPION, "previous": registry.PREVIOUS, "challenger": registry.CHALLENGER}


@launch.step("promote", run=False)  # to read a history is no run
def main(cfg: DictConfig) -> None:
    name, wanted = cfg.registered_model_name, cfg.version
    if not name:
        raise UserError("registered_model_name=null: promote needs the name of a registered model")
    registry.check_name(name)
    registry.check_name(cfg.to)
    if wanted is None and not cfg.history:
        raise UserError(f"version is required: add -P version=VALUE, one of {registry.known_versions(name)}")
    wanted = "champion" if wanted is None else str(wanted)
    version = registry.by_alias(name, ALIASES[wanted]) if wanted in ALIASES else registry.by_number(name, wanted)
    if version is None:
        raise UserError(f"version={wanted} of {name} does not exist: give {registry.known_versions(name)}")
    if cfg.history:
        print(registry.history(version))
        return
    with tracking.start_run("promote", cfg):
        move(cfg, version)


def move(cfg: DictConfig, version: ModelVersion) -> None:
    """Make a version the champion of its model, or its copy the champion of `to`, if it passed the gate or is forced."""
    name, number = cfg.to or version.name, registry.number_of(version)
    before = registry.number_of(registry.champion_of(name))
    is_copied = name != version.name
    # A version that served before passed the gate once; any other shows its verdict or is forced.
    verdict = version.tags.get("gate.verdict", "none")
    passed = verdict == "PROMOTE" or "promoted_at" in version.tags or (number == before and not is_copied)
    if not passed and not cfg.force:
        raise UserError(
            f"version={number} of {version.name} has gate verdict {verdict}: add -P force=true to promote it all the same"
        )

    if is_copied:
        version = registry.copy_to(version, name)
        number = registry.number_of(version)
    if number == before:
        print(f"promote: {name} version {number} is the champion already")
        return
    registry.promote(version, expected=before, reason=cfg.reason)
    mlflow.set_tags({"model_version": number, "previous_version": before})
    summary = {"champion": f"{name} version {number}", "before": f"version {before}"}
    if before != "none":
        back = tracking.step_command("promote", f"registered_model_name={name}", "version=previous")
        summary["roll back"] = back
    tracking.print_summary("promote", summary)


if __name__ == "__main__":
    main()
