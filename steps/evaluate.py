"""evaluate: score a model on the test part, compare it with the champion, decide, register, promote.

    mlflow run . -e evaluate --env-manager local -P run_id=<id of a train run>
    python -m steps.evaluate model_uri=models:/alacarte/3 feedback=default gate.dry_run=true

Leaves behind a run with test_ metrics, plots and gate.json, and a version with alias `challenger`, or `champion`.
"""

from dataclasses import asdict

import mlflow
from omegaconf import DictConfig

from alacarte import launch, learners, registry, tracking
from alacarte.data.dataset import as_mlflow, load_data, recorded
from alacarte.data.tables import nearest
from alacarte.errors import UserError
from alacarte.evaluation import metrics as evaluation
from alacarte.evaluation.comparison import compare
from alacarte.evaluation.gate import Verdict, check_gate, decide
from alacarte.evaluation.plots import plots
from alacarte.feedback import Store


@launch.step("evaluate")
def main(cfg: DictConfig) -> None:
    name, gate = cfg.registered_model_name, launch.plain(cfg.gate)
    check_gate(**gate)
    registry.check_name(name)
    slices = [gate["slices"]] if isinstance(gate["slices"], str) else gate["slices"]
    model = registry.locate(tracking.model_uri_of(cfg.run_id, cfg.model_uri))
    learner = learners.load(model.path)
    data = launch.plain(cfg.data) if cfg.get("data") else model.metadata.get("data")
    if not data:
        raise UserError(f"model_uri={cfg.model_uri} does not record its data: add -P data=... for the rows to test on")
    dataset = load_data(**(data if cfg.get("data") else recorded(data)))
    X, y = dataset.part("test")
    for column in set(slices) - set(X):
        raise UserError(f"gate.slices={column} is no input column: {nearest(column, X.columns)}")
    mlflow.set_tags({"source_run_id": model.run_id or "none", "dataset_digest": dataset.digest})

    predicted, proba = learner.predict(X), learner.predict_proba(X)
    scores = evaluation.score(y, predicted, proba, learner.classes, dataset.task)
    constant = evaluation.baseline(dataset.part("train")[1], y, dataset.task)

    # The champion answers the same rows, and the labelled requests if any. A model is not compared with itself.
    champion = registry.champion_of(name) if name else None
    rival = registry.locate(f"models:/{name}/{champion.version}") if champion else None
    itself = rival is not None and rival.is_same(model)
    found = refusal = None
    if itself:
        refusal = f"this model is the champion, version {registry.number_of(champion)}"
    elif rival is not None:
        store = Store(cfg.feedback.url) if cfg.get("feedback") and cfg.feedback.url else None
        labelled = store.labelled(name, "accepted", "used") if store else None
        try:
            found = compare(rival.path, learner, dataset, labelled, gate)
        except UserError as error:
            refusal = f"champion version {registry.number_of(champion)} cannot be compared: {error}"
    verdict = Verdict("HOLD", refusal, []) if refusal else decide(
        scores, task=dataset.task, baseline=constant, comparison=found.test if found else None,
        audit=found.audit if found else None,
        **{key: gate[key] for key in ("rule", "margin", "strict", "least_audit", "floors", "ceilings")},
    )  # fmt: skip

    tracking.log_scores(scores, "test", as_mlflow(dataset, "test", predicted), model.model_id)
    if found:
        mlflow.log_metrics({f"audit_{metric}": value for metric, value in found.report.get("metrics", {}).items()})
    for file, figure in plots(
        y, predicted, proba, learner.classes, dataset.task, found.answers if found else None
    ).items():
        mlflow.log_figure(figure, file)
    if slices:
        table = evaluation.by_slice(y, predicted, proba, learner.classes, dataset.task, X[slices])
        mlflow.log_table(table, "slices.json")
    for alarm in found.worse_slices if found else []:
        print("evaluate: worse than the champion where {column} is {value}: {gain:+.3f} on {n} rows".format(**alarm))

    # The verdict is on record before the alias moves.
    version = champion if itself else None
    if name and not itself and not gate["dry_run"]:
        logged = model if model.model_id else learner.log("model", example=X.head(5), metadata=model.metadata)
        version = registry.register(name, f"models:/{logged.model_id}")
    versions = {"challenger": registry.number_of(version), "champion": registry.number_of(champion)}
    report = {
        "verdict": verdict.decision, "reason": verdict.reason, "versions": versions, "metrics": scores, "baseline": constant,
        "comparison": asdict(found.test) if found else None, "audit": found.report if found else {},
        "worse_slices": found.worse_slices if found else [], "checks": verdict.checks, "gate": gate,
    }  # fmt: skip
    mlflow.log_dict(report, "gate.json")
    run_id = tracking.active_run().info.run_id
    if version and not itself and registry.settle(version, verdict, expected=versions["champion"], run_id=run_id):
        champion = version
    tags = registry.verdict_tags(verdict, versions["champion"], run_id)
    mlflow.set_tags({**tags, "model_version": versions["challenger"], "champion_after": registry.number_of(champion)})
    print(f"evaluate: {verdict.decision}, {verdict.reason}")


if __name__ == "__main__":
    main()
