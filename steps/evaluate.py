"""evaluate: score a model on the test rows, compare it with the champion, decide, register, promote.

    mlflow run . -e evaluate --env-manager local -P run_id=<id of a train run>
    python -m steps.evaluate model_uri=models:/alacarte/3 feedback=default gate.dry_run=true

Result: a run with test_ metrics, plots and gate.json, and a version with the alias `challenger`, or also `champion`.
"""

import mlflow
from mlflow.entities.model_registry import ModelVersion
from omegaconf import DictConfig
from pandas import DataFrame

from alacarte import launch, learners, registry, tracking
from alacarte.data.dataset import DataReader
from alacarte.errors import UserError
from alacarte.evaluation import report
from alacarte.evaluation.comparison import Compared, compare
from alacarte.evaluation.gate import Verdict, check_gate, decide
from alacarte.evaluation.rows import JudgingRows, choose_rows, own_rows
from alacarte.feedback import Store
from alacarte.learners import Learner
from alacarte.registry import Located, number_of


@launch.step("evaluate")
def main(cfg: DictConfig) -> None:
    if isinstance(cfg.gate.slices, str):
        cfg.gate.slices = [cfg.gate.slices]
    name, gate = cfg.registered_model_name, launch.plain(cfg.gate)
    check_gate(**gate)
    registry.check_name(name)
    model = registry.locate(tracking.model_uri_of(cfg.run_id, cfg.model_uri))
    learner = learners.load(model.path)
    champion = registry.champion_of(name) if name else None
    rival = registry.locate(f"models:/{name}/{champion.version}") if champion else None
    is_champion = rival is not None and rival.is_same(model)

    rows, compared, refusal = compare_with(rival, model, learner, cfg)
    mlflow.set_tags({"source_run_id": model.run_id or "none", "dataset_digest": rows.dataset.digest})
    scored = report.score(learner, rows)
    verdict = Verdict("HOLD", refusal, []) if refusal else decide(
        scored.metrics, task=rows.dataset.task, baseline=scored.baseline, **(compared.evidence if compared else {}),
        **{key: gate[key] for key in ("rule", "margin", "strict", "min_audit_rows", "floors", "ceilings")},
    )  # fmt: skip
    report.log_scores(scored, learner, rows, compared, gate, model.model_id)

    version = champion if is_champion else register(model, learner, rows.for_challenger.head(5), cfg)
    numbers = {"challenger": number_of(version), "champion": number_of(champion)}
    report.log_gate(verdict, scored, rows, compared, gate, numbers)  # the verdict is on record before the alias moves
    run_id = tracking.active_run().info.run_id
    if version and not is_champion:
        champion = registry.apply_verdict(version, verdict, expected=numbers["champion"], run_id=run_id) or champion
    tags = registry.verdict_tags(verdict, numbers["champion"], run_id)
    mlflow.set_tags({**tags, "model_version": numbers["challenger"], "champion_after": number_of(champion)})
    for note in report.notes(rows, compared):
        print(f"evaluate: {note}")
    print(f"evaluate: {verdict.decision}, {verdict.reason}")


def compare_with(
    rival: Located | None, model: Located, learner: Learner, cfg: DictConfig
) -> tuple[JudgingRows, Compared | None, str | None]:
    """The rows that judge, the comparison on them, and why there is no comparison where there is a champion."""
    gate, read, data = launch.plain(cfg.gate), DataReader(), launch.plain(cfg.data) if cfg.get("data") else None
    rows = own_rows(model.metadata, read, data, gate["slices"])
    if rival is None:
        return rows, None, None
    if rival.is_same(model):
        return rows, None, "this model is the champion"
    url = cfg.feedback.url if cfg.get("feedback") else None
    labelled = Store(url).labelled(cfg.registered_model_name, "accepted", "used") if url else None
    judging = {"data": data, "labelled": labelled, "min_rows": gate["min_test_rows"]}
    try:
        rows = choose_rows(rival.metadata, model.metadata, read, **judging)
        return rows, compare(rival.path, learner, rows, labelled, gate), None
    except UserError as error:
        return rows, None, f"this model cannot be compared with the champion: {error}"


def register(model: Located, learner: Learner, example: DataFrame, cfg: DictConfig) -> ModelVersion | None:
    """The version that holds the model; None without a registry and in a dry run."""
    if not cfg.registered_model_name or cfg.gate.dry_run:
        return None
    logged = model if model.model_id else learner.log("model", example=example, metadata=model.metadata)
    return registry.register(cfg.registered_model_name, f"models:/{logged.model_id}")


if __name__ == "__main__":
    main()
