"""Audit rows: labelled requests that were drawn at random. A part of them only ever judges. Pure functions of labels.

A hash of the inputs halves the audit rows for good: one half trains, the other half judges. Labels that annotators chose
to report are mostly mistakes of the model, so they train and never judge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from alacarte.data.dataset import Dataset
from alacarte.data.splits import hash_present, hash_split, occurs_in
from alacarte.feedback.queries import Labelled

GATE_SEED = 20_000  # of the hash that halves the audit rows; another seed would let the gate judge by rows that trained
ONE_PARTY = (
    "no label carries the name of a token, so all labels count as labels of one annotator and no limit per annotator "
    "applies: start the server with SERVE_FEEDBACK_TOKEN=alice:TOKEN,bob:TOKEN to tell annotators apart"
)


@dataclass(frozen=True, eq=False)
class AuditRows:
    """The labels by which the gate judges."""

    rows: Labelled
    counts: dict[str, int]  # annotator -> number of rows
    left_out: dict[str, int]  # annotator -> number of rows above the largest share of one annotator
    are_told_apart: bool  # False: all labels count as labels of one annotator

    def notes(self, max_share: float) -> list[str]:
        """One sentence for each thing that a user should know about the annotators of these rows."""
        if self.counts and not self.are_told_apart:
            return [ONE_PARTY]
        counts = ", ".join(f"{annotator} {count:,}" for annotator, count in self.left_out.items())
        limit = f"one annotator gives at most gate.max_share_per_annotator={max_share:g} of the audit rows that judge"
        return [f"audit rows left out, by annotator: {counts}; {limit}"] if counts else []


def for_gate(labelled: Labelled) -> np.ndarray:
    """(n,) bool: the labels that only ever judge, half of the labels of audit rows."""
    if labelled.labels.empty:
        return np.zeros(0, bool)
    half = hash_split(hash_present(labelled.inputs), val=0.25, test=0.5, seed=GATE_SEED) == "test"
    return half & labelled.about["audit"].to_numpy(bool)


def annotators(labelled: Labelled) -> pd.Series:
    """(n,) the annotator of each label: "token:NAME", "token:" for a token without name, "address:IP", "local:USER"."""
    return labelled.about["annotator"].fillna("(unknown)").astype(str)


def are_told_apart(labelled: Labelled) -> bool:
    """Whether a label carries the name of a token. Without one, all labels count as labels of one annotator."""
    return bool(annotators(labelled).str.fullmatch("token:.+").any())


def select_audit_rows(labelled: Labelled, *trained_on: Dataset, max_share: float) -> AuditRows:
    """The labels that judge, without rows that a training has seen.

    Left out are inputs in the train or val part of one of the data sets `trained_on`, and inputs of a label that a
    training used. Where annotators are told apart, the newest rows of each are kept, at most `max_share` of all rows that
    are kept; of k annotators, each may always have the share 1 / k.
    """
    judging = for_gate(labelled)
    if judging.any():
        used = ~judging & (labelled.about["state"] == "used").to_numpy()
        judging &= ~occurs_in(labelled.inputs, labelled.inputs[used])
        for dataset in trained_on:
            judging &= ~occurs_in(labelled.inputs, dataset.X[dataset.is_trained_on])
    rows, told_apart, left_out = subset(labelled, judging), are_told_apart(labelled), {}
    if told_apart and judging.any():
        who = annotators(rows)
        limit = largest_count(who.value_counts().to_dict(), max_share)
        above = (who[::-1].groupby(who[::-1]).cumcount()[::-1] >= limit).to_numpy()  # the newest are the last
        left_out = who[above].value_counts().to_dict()
        rows = subset(rows, ~above)
    return AuditRows(rows, annotators(rows).value_counts().to_dict(), left_out, told_apart)


def largest_count(counts: Mapping[str, int], max_share: float) -> int:
    """The largest number of rows that each annotator may keep so that no one keeps more than `max_share` of all rows."""
    share, limit = max(max_share, 1 / len(counts)), max(counts.values())
    while limit > share * sum(min(count, limit) for count in counts.values()) + 1e-9:
        limit -= 1
    return limit


def subset(labelled: Labelled, rows: np.ndarray) -> Labelled:
    """The labels at these positions, or where `rows` (n,) bool is true."""

    def part(table: Any) -> Any:
        return table.iloc[rows].reset_index(drop=True)

    return Labelled(part(labelled.inputs), part(labelled.labels), part(labelled.about))
