"""How well a retraining learns what is new, keeps what is old, and is judged: Markdown tables for docs/retraining.md.

    python -m benchmarks.retrain              # ten seeds, on one core
    python -m benchmarks.retrain --quick      # two seeds, to see that it runs

Each arm trains on the same rows, made by the library from the same labels: `scratch` as a first training does, with
early stopping; `equal budget` so, with no more epochs than `warm` has; `same recipe` from nothing with the epochs and rates of
`warm`; `warm` as retrain does; `feedback only` without the old rows, at the same number of sample visits; `another seed` is the
champion's own training on the old rows once more. Accuracies are
in percent, on rows like the requests that nobody labelled (new) and on the test part (old). The settings were chosen on seeds
below 100, the tables are of seeds from 1000 on.
"""

import argparse
import copy
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from alacarte.evaluation import audit, gate
from alacarte.evaluation.comparison import compare
from alacarte.evaluation.metrics import answer, measure
from alacarte.feedback.queries import Labelled
from alacarte.learners.network import NetworkLearner
from alacarte.retraining import selection
from benchmarks.retrain_cases import TARGETS, Case, give_labels, join, make_case
from benchmarks.retrain_gate import print_simulation

CONF = Path(__file__).resolve().parent.parent / "conf"
FAMILIES = {
    "torch_mlp": ("rotation", "file order", "table"),
    "sklearn_mlp": ("rotation", "file order", "table"),
    "sklearn_sgd": ("rotation", "file order", "table"),
    "sklearn_hgb": ("table",),
}
ROUNDS = 5
VERDICTS = ("PROMOTE", "HOLD", "REJECT")


@dataclass(frozen=True)
class Result:
    """Of one arm and seed."""

    new: float  # accuracy, in percent
    old: float
    samples_seen: float  # rows x epochs
    verdict: str = ""


def settings(*overrides: str) -> dict[str, Any]:
    """The groups retrain and gate of conf/, with what the command line sets."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("retrain", list(overrides))
    return {"retrain": dict(config.retrain), "gate": dict(config.gate)}


def first_model(family: str, case: Case, seed: int) -> Any:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", [f"model={family}", *(["model.device=cpu"] if family.startswith("torch") else [])])
    made = instantiate(config.model)
    made.fit(*case.dataset.part("train"), *case.dataset.part("val"), task=case.dataset.task, seed=seed)
    return made


def labels_for_training(labelled: Labelled, case: Case, model: Any, how: dict[str, Any]) -> Labelled:
    limits = {key: how["retrain"][key] for key in ("init", "new_classes", "max_range_factor")}
    limits["max_labels_per_annotator"] = selection.most_labels(case.dataset, how["retrain"])
    chosen = selection.choose(labelled, case.dataset, classes=model.classes, rejected=[], **limits)
    return audit.subset(labelled, np.concatenate([chosen.replayed, chosen.new]))


def rows_of(labelled: Labelled, case: Case, how: dict[str, Any], seed: int) -> selection.Rows:
    amounts = {key: how["retrain"][key] for key in ("max_replay_rows", "label_weight")}
    return selection.make_rows(case.dataset, labelled, case.fractions, **amounts, seed=seed)


def update(model: Any, rows: selection.Rows, how: dict[str, Any], seed: int, **more: Any) -> tuple[Any, int]:
    """A copy of the model, trained on; and the sample visits."""
    made = copy.deepcopy(model)
    plan = {"init": "warm", "share": how["retrain"]["epoch_fraction"], "shrink": how["retrain"]["shrink"], **more}
    return made, made.update(*rows.train, *rows.val, seed=seed, **plan).samples_seen


def with_epochs(model: Any, epochs: int) -> Any:
    """A copy whose trainings from scratch have no more than so many epochs."""
    made = copy.deepcopy(model)
    if isinstance(made, NetworkLearner):
        made.settings["max_epochs"] = epochs
    else:
        made.model[-1].max_iter = epochs
    return made


def accuracy(model: Any, part: tuple) -> float:
    return 100 * measure(answer(model, *part))["accuracy"]


def judge(champion: Any, challenger: Any, case: Case, labelled: Labelled, how: dict[str, Any]) -> str:
    """The gate's verdict by the test part and the labels that only judge."""
    judging = audit.select_audit_rows(labelled, case.dataset, max_share=how["gate"]["max_share_per_annotator"]).rows
    compared = []
    for X, y in (case.dataset.part("test"), (judging.inputs, judging.labels)):
        before, after = (answer(model, X, y) for model in (champion, challenger))
        compared.append(compare(before, after, confidence_level=how["gate"]["confidence_level"]))
    rules = {key: how["gate"][key] for key in ("margin", "strict", "min_audit_rows")}
    return gate.decide({}, task="classification", comparison=compared[0], audit=compared[1], **rules).decision


def once(champion: Any, case: Case, how: dict[str, Any], seed: int, wrong: float = 0.0, control: bool = True) -> dict:
    """Every arm on the labels of all requests."""
    X, y = case.requests
    labelled = give_labels(X, y, champion.predict(X), np.random.default_rng([seed, 7]), 0, wrong)
    rows = rows_of(labels_for_training(labelled, case, champion, how), case, how, seed)
    X_all, y_all = rows.train
    alone = selection.Rows((X_all[rows.n_replayed :], y_all[rows.n_replayed :]), rows.val, 0)
    budget = how["retrain"]["epoch_fraction"]
    short = with_epochs(champion, max(1, int(budget * champion.epochs)))
    arms = {
        "scratch": update(champion, rows, how, seed, init="scratch"),
        "equal budget": update(short, rows, how, seed, init="scratch"),
        "warm": update(champion, rows, how, seed),
    }
    if control and isinstance(champion, NetworkLearner):
        arms["same recipe"] = update(champion, rows, how, seed, init="shrink_perturb", shrink=0)
        arms["shrink_perturb"] = update(champion, rows, how, seed, init="shrink_perturb")
    if control:
        share = budget * len(X_all) / len(alone.train[0])
        arms["feedback only"] = update(champion, alone, how, seed, share=share)
        old = selection.Rows(case.dataset.part("train"), case.dataset.part("val"), 0)
        arms["another seed"] = update(champion, old, how, seed + 1, init="scratch")
    test, held = case.dataset.part("test"), case.held
    results = {"champion": Result(accuracy(champion, held), accuracy(champion, test), 0)}
    for arm, (model, samples_seen) in arms.items():
        verdict = judge(champion, model, case, labelled, how)
        results[arm] = Result(accuracy(model, held), accuracy(model, test), samples_seen, verdict)
    return results


def in_rounds(champion: Any, case: Case, how: dict[str, Any], seed: int) -> dict[str, Result]:
    """Five retrainings in a row, each from the one before it; beside the last, one from scratch on the same rows."""
    model, labels = champion, []
    test, held = case.dataset.part("test"), case.held
    results = {"champion": Result(accuracy(champion, held), accuracy(champion, test), 0)}
    X, y = case.requests
    for round_, places in enumerate(np.array_split(np.arange(len(y)), ROUNDS)):
        X_now, y_now = X.iloc[places], y.iloc[places]
        draw = np.random.default_rng([seed, 8, round_])
        labels.append(give_labels(X_now, y_now, model.predict(X_now), draw, int(places[0])))
        rows = rows_of(labels_for_training(join(labels), case, champion, how), case, how, seed)
        model, samples_seen = update(model, rows, how, seed + round_)
        for earlier in labels:
            earlier.about.loc[~audit.for_gate(earlier), "state"] = "used"
        results[f"round {round_ + 1}"] = Result(accuracy(model, held), accuracy(model, test), samples_seen)
    fresh, samples_seen = update(champion, rows, how, seed, init="scratch")
    return results | {"scratch": Result(accuracy(fresh, held), accuracy(fresh, test), samples_seen)}


# --- tables ----------------------------------------------------------------------------------------------------------


def spread(values: Any) -> str:
    values = np.asarray(values, float)
    return f"{values.mean():.1f} ± {values.std(ddof=1) if len(values) > 1 else 0:.1f}"


def column(results: list[dict[str, Result]], arm: str, key: str) -> np.ndarray:
    return np.array([asdict(result[arm])[key] for result in results], dtype=object if key == "verdict" else float)


def print_arms(cases: dict[tuple[str, str], list[dict[str, Result]]], key: str) -> None:
    arms = list(dict.fromkeys(arm for results in cases.values() for arm in results[0]))
    print(f"\n| family | regime | {' | '.join(arms)} |\n|---|---|{'---|' * len(arms)}")
    for (family, regime), results in cases.items():
        cells = [spread(column(results, arm, key)) if arm in results[0] else "" for arm in arms]
        print(f"| {family} | {regime} | {' | '.join(cells)} |")


def print_targets(cases: dict[tuple[str, str], list[dict[str, Result]]], floor: float = -1.0) -> None:
    print(
        f"\n| family | regime | warm to scratch, new (≥ {floor:.0f}) | warm to equal budget, new (≥ 2) "
        "| warm to champion, old (≥ -2) | samples seen (≤ .25) | missed |\n|---|---|---|---|---|---|---|"
    )
    for (family, regime), results in cases.items():
        new, old = ({arm: column(results, arm, key) for arm in results[0]} for key in ("new", "old"))
        gaps = [new["warm"] - new["scratch"], new["warm"] - new["equal budget"], old["warm"] - old["champion"]]
        samples_seen = (column(results, "warm", "samples_seen") / column(results, "scratch", "samples_seen")).mean()
        missed = [
            name
            for name, gap, least in zip(("scratch", "equal budget", "old"), gaps, (floor, 2, -2), strict=True)
            if gap.mean() < least
        ]
        missed += ["samples seen"] if samples_seen > 0.25 else []
        texts = " | ".join(spread(gap) for gap in gaps)
        print(f"| {family} | {regime} | {texts} | {samples_seen:.2f} | {', '.join(missed)} |")


def print_rounds(cases: dict[tuple[str, str], list[dict[str, Result]]]) -> None:
    last = f"round {ROUNDS}"
    heads = ["champion", *(f"round {i + 1}" for i in range(ROUNDS)), "scratch"]
    print(f"\n| family | regime | rows | {' | '.join(heads)} | {last} to scratch | {last} to champion |")
    print(f"|---|---|---|{'---|' * (len(heads) + 2)}")
    for (family, regime), results in cases.items():
        for key in ("new", "old"):
            values = {head: column(results, head, key) for head in heads}
            means = " | ".join(f"{values[head].mean():.1f}" for head in heads)
            gaps = " | ".join(spread(values[last] - values[other]) for other in ("scratch", "champion"))
            print(f"| {family} | {regime} | {key} | {means} | {gaps} |")


def print_verdicts(cases: dict[tuple[str, str], list[dict[str, Result]]]) -> None:
    """What the gate says of the arms, and of another seed by whether the held rows show a gain."""
    all_results = [result for results in cases.values() for result in results]
    no_better = [result for result in all_results if result["another seed"].new <= result["champion"].new]
    groups = {"feedback only": [result["feedback only"] for result in all_results]}
    groups["another seed, no better on the held rows"] = [result["another seed"] for result in no_better]
    better = [result for result in all_results if result not in no_better]
    groups["another seed, better there"] = [result["another seed"] for result in better]
    for arm in ("warm", "scratch", "equal budget"):
        groups[arm] = [result[arm] for result in all_results]
    print(f"\n| challenger | cases | {' | '.join(VERDICTS)} |\n|---|---|---|---|---|")
    for name, results in groups.items():
        verdicts = [result.verdict for result in results]
        print(f"| {name} | {len(verdicts)} | {' | '.join(str(verdicts.count(verdict)) for verdict in VERDICTS)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=1000, help="the first seed")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "overrides", nargs="*", help="of conf/retrain and conf/gate, such as retrain.epoch_fraction=0.1"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    threadpool_limits(1)
    how, began = settings(*arguments.overrides), time.monotonic()
    seeds = range(arguments.first, arguments.first + (2 if arguments.quick else arguments.seeds))
    clean, noisy, rounds = defaultdict(list), defaultdict(list), defaultdict(list)
    for seed in seeds:
        for regime in TARGETS:
            case = make_case(regime, seed)
            for family in [name for name in arguments.families if regime in FAMILIES[name]]:
                champion, at = first_model(family, case, seed), (family, regime)
                clean[at].append(once(champion, case, how, seed))
                noisy[at].append(once(champion, case, how, seed, wrong=0.1, control=False))
                rounds[at].append(in_rounds(champion, case, how, seed))
        print(f"seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr)

    print(f"{len(seeds)} seeds; percent, mean ± standard deviation.\n\n### Targets")
    print_targets(clean)
    print("\n### Targets with 10 % wrong labels")
    print_targets(noisy, floor=0.0)
    print("\n### Five rounds in a row")
    print_rounds(rounds)
    for key in ("new", "old"):
        print(f"\n### All arms, {key} rows")
        print_arms(clean, key)
    print("\n### The gate on these arms, all families and regimes together")
    print_verdicts(clean)
    print("\n### The gate on models of known quality")
    print_simulation(how["gate"], 200 if arguments.quick else 1000)


if __name__ == "__main__":
    main()
