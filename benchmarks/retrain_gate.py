"""How often each verdict falls on challengers whose true quality is known, because their answers are drawn."""

from functools import cache
from typing import Any

import numpy as np

from alacarte.evaluation import gate
from alacarte.evaluation.comparison import Comparison, paired_test

TEST_ROWS = 360
CASES = {  # shares of the rows that the challenger wins and loses: on the test rows, on the audit rows
    "equal": ((0.03, 0.03), (0.05, 0.05)),
    "equal, differ in more rows": ((0.03, 0.03), (0.10, 0.10)),
    "1 point worse on both": ((0.025, 0.035), (0.045, 0.055)),
    "5 points better on audit rows": ((0.03, 0.03), (0.08, 0.03)),
    "10 points better on audit rows": ((0.03, 0.03), (0.13, 0.03)),
    "10 points worse on audit rows": ((0.03, 0.03), (0.03, 0.13)),
    "5 points worse on test rows": ((0.01, 0.06), (0.13, 0.03)),
}


@cache
def compared(n: int, wins: int, flips: int, confidence_level: float) -> Comparison:
    champion, challenger = np.zeros(n), np.zeros(n)
    champion[:wins] = 1
    challenger[wins : wins + flips] = 1
    return paired_test(champion, challenger, confidence_level=confidence_level)


def print_simulation(settings: dict[str, Any], trials: int) -> None:
    print(f"\n{trials:,} trials each, {TEST_ROWS} test rows; shares in percent: PROMOTE, HOLD, REJECT.\n")
    sizes = (30, 50, 100, 200, 400)
    print(f"| challenger | {' | '.join(f'{n} audit rows' for n in sizes)} |\n|---|{'---|' * len(sizes)}")
    rules = {key: settings[key] for key in ("margin", "strict", "min_audit_rows")}
    for name, rates in CASES.items():
        cells = []
        for n in sizes:
            draw, verdicts = np.random.default_rng(n), []
            for _ in range(trials):
                pair = []
                for size, (won, lost) in zip((TEST_ROWS, n), rates, strict=True):
                    wins, flips, _ = draw.multinomial(size, [won, lost, 1 - won - lost])
                    pair.append(compared(size, int(wins), int(flips), settings["confidence_level"]))
                verdict = gate.decide({}, task="classification", comparison=pair[0], audit=pair[1], **rules)
                verdicts.append(verdict.decision)
            cells.append(
                ", ".join(
                    f"{100 * verdicts.count(decision) / trials:.0f}" for decision in ("PROMOTE", "HOLD", "REJECT")
                )
            )
        print(f"| {name} | {' | '.join(cells)} |")
