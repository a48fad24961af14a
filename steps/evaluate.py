"""evaluate: score a model on the test rows, compare it with the champion, decide, register, promote.

    mlflow run . -e evaluate --env-manager local -P run_id=<id of a train run>
    python -m steps.evaluate model_uri=models:/alacarte/3 feedback=default gate.dry_run=true

Result: a run with test_ metrics, plots and gate.json, and a version with the alias `challenger`, or also `champion`.
"""

import mlflow
from mlflow.entities.model_registry import ModelVersion
from omegaconf import DictConfig
from pandas import DataFrame

from alacarte import launch, registry, tracking
from alacarte.evaluation import report
from alacarte.evaluation.champion_challenger import Model, compare_with, is_trusted, load, load_rival
from alacarte.evaluation.comparison import measure_signal
from alacarte.evaluation.gate import Verdict, check_gate, check_metric, decide
from alacarte.evaluation.metrics import answer, load_metrics, measure
from alacarte.feedback import Store
from alacarte.registry import number_of


@launch.step("evaluate")
def main(cfg: DictConfig) -> None:
    cfg.gate.slices = [cfg.gate.slices] if isinstance(cfg.gate.slices, str) else cfg.gate.slices or []
    name, gate, metrics = cfg.registered_model_name, launch.plain(cfg.gate), load_metrics(launch.plain(cfg.metrics))
    check_gate(**gate, metrics=metrics)
    registry.check_name(name)

    model = load(tracking.model_uri_of(cfg.run_id, cfg.model_uri))
    champion = registry.champion_of(name) if name else None
    check_metric(gate["metric"], champion.tags if champion else {})
    rival, no_champion = load_rival(champion)
    is_champion = rival is not None and rival.located.is_same(model.located)

    url = cfg.feedback.url if cfg.get("feedback") else None
    labelled = Store(url).labelled(name, "accepted", "used") if url and rival else None
    data = launch.plain(cfg.data) if cfg.get("data") else None
    rows, compared, refusal = compare_with(
        rival, model, data=data, labelled=labelled, gate=gate, metrics=metrics, named_by_run=bool(cfg.run_id)
    )
    dataset = rows.dataset
    mlflow.set_tags({"source_run_id": model.located.run_id or "none", "dataset_digest": dataset.digest})
    answers = answer(model.learner, rows.for_challenger, dataset.part("test")[1], rows.weight)
    scores = measure(answers, metrics)
    signal = measure_signal(answers, dataset.part("train")[1], gate["confidence_level"]) if compared is None else None
    verdict = Verdict("HOLD", refusal, []) if refusal else decide(
        scores, task=dataset.task, signal=signal, no_champion=no_champion, **(compared.evidence if compared else {}),
        **{key: gate[key] for key in ("margin", "strict", "min_audit_rows", "floors", "ceilings")},
    )  # fmt: skip
    report.log_scores(scores, answers, rows, compared, metrics, gate["slices"], model.located.model_id)
    if cfg.explain:
        report.log_importance(model.learner, rows, gate["metric"], metrics)

    version = champion if is_champion else register(model, rows.for_challenger.head(5), cfg)
    numbers = {"challenger": number_of(version), "champion": number_of(champion)}
    report.log_gate(verdict, scores, signal, rows, compared, gate, numbers)  # on record before the alias moves
    run_id = tracking.active_run().info.run_id
    report.log_card(verdict, scores, rows, None if is_champion else version)
    if version and not is_champion:
        record = {"expected": numbers["champion"], "run_id": run_id, "metric": gate["metric"]}
        signs = is_trusted(champion, rival)
        champion = report.apply_verdict(version, model, verdict, **record, signs=signs) or champion
    tags = report.verdict_tags(verdict, numbers["champion"], run_id, gate["metric"])
    mlflow.set_tags({**tags, "model_version": numbers["challenger"], "champion_after": number_of(champion)})
    for note in report.notes(rows, compared):
        print(f"evaluate: {note}")
    summary = {
        "model": f"{name} version {numbers['challenger']}" if version else "not registered",
        "metrics": f"test {tracking.describe_metrics(scores)}",
        "verdict": f"{verdict.decision}, {verdict.reason}",
        "champion": f"version {number_of(champion)}",
    }
    if version and number_of(champion) == numbers["challenger"]:
        summary["next"] = tracking.step_command("serve", f"registered_model_name={name}")
    elif version:
        number = numbers["challenger"]
        source = f"run_id={cfg.run_id}" if cfg.run_id else f"model_uri=models:/{name}/{number}"
        store = ["feedback=default", *([f"feedback.url={url}"] if url else [])]
        summary["again"] = tracking.step_command("evaluate", source, f"registered_model_name={name}", *store)
        by_hand = (f"registered_model_name={name}", f"version={number}", "force=true")
        summary["by hand"] = tracking.step_command("promote", *by_hand)
    tracking.print_summary("evaluate", summary)


def register(model: Model, example: DataFrame, cfg: DictConfig) -> ModelVersion | None:
    """The version that holds the model; None without a registry and in a dry run."""
    if not cfg.registered_model_name or cfg.gate.dry_run:
        return None
    located = model.located
    logged = located if located.model_id else model.learner.log("model", example=example, metadata=located.metadata)
    return registry.register(cfg.registered_model_name, f"models:/{logged.model_id}")


if __name__ == "__main__":
    main()
