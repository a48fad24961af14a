"""A window of predictions as plots and as one self-contained HTML page."""

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from string import Template
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 20

PAGE = Template("""<!doctype html>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } .yes { color: #b00 } .no { color: #070 }
</style>
<h1>$title</h1>
<p class="$decision"><b>retrain: $decision</b>, $reason</p>
$body
""")


def drift_figure(marked: pd.DataFrame) -> "Figure":
    """The population stability index of the columns that moved furthest; those that count are dark."""
    from matplotlib.figure import Figure

    top = marked.head(MOST_BARS).iloc[::-1]
    figure = Figure(figsize=(7, 1 + 0.25 * len(top)), layout="constrained")
    axes = figure.subplots()
    axes.barh(top["column"].astype(str), top["psi"], color=["#b03030" if one else "#b8c4d0" for one in top["drifted"]])
    axes.set_xlabel("population stability index")
    return figure


def answers_figure(before: Sequence, after: Sequence, name: str) -> "Figure":
    """What the model answered on the data it knows, and in the window, as shares."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    known, asked = pd.Series(before), pd.Series(after)
    if pd.api.types.is_float_dtype(known) and known.nunique() > MOST_BARS:
        axes.hist([known, asked.astype(float)], bins=30, density=True, label=["data", "window"])
    else:
        shares = pd.DataFrame(
            {"data": known.value_counts(normalize=True), "window": asked.value_counts(normalize=True)}
        )
        shares.fillna(0).sort_index().head(MOST_BARS).plot.bar(ax=axes, rot=0)
    axes.set_xlabel(name)
    axes.legend()
    return figure


def page(
    title: str,
    decision: bool,
    reason: str,
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, "Figure"],
) -> str:
    """HTML with every text in it escaped."""
    parts = []
    for heading, table in tables.items():
        shown = table.to_html(index=False, escape=True, border=0, float_format=lambda value: f"{value:.4g}")
        parts.append(f"<h2>{html.escape(heading)}</h2>\n{shown}")
    for heading, figure in figures.items():
        data = BytesIO()
        figure.savefig(data, format="png")
        image = base64.b64encode(data.getvalue()).decode()
        parts.append(f'<h2>{html.escape(heading)}</h2>\n<img alt="" src="data:image/png;base64,{image}">')
    values: dict[str, Any] = {"title": html.escape(title), "reason": html.escape(reason), "body": "\n".join(parts)}
    return PAGE.substitute(values, decision="yes" if decision else "no")
