"""A window of predictions as plots and as one self-contained HTML page."""

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from string import Template
from typing import TYPE_CHECKING

import mlflow
import pandas as pd

from alacarte.evaluation.plots import new_figure, plain_text
from alacarte.monitoring.drift import Decision
from alacarte.monitoring.window import WindowComparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BARS = 20

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


def log_report(comparison: WindowComparison, model: str, target: str) -> None:
    """Log metrics, the table of columns, plots and report.html to the active run."""
    mlflow.log_metrics(comparison.metrics)
    mlflow.log_table(comparison.columns, "drift.json")
    answers = answers_figure(*comparison.answers, target)
    figures = {"drift.png": drift_figure(comparison.columns), "answers.png": answers}
    for file, figure in figures.items():
        mlflow.log_figure(figure, file)
    metrics = pd.DataFrame({"metric": list(comparison.metrics), "value": list(comparison.metrics.values())})
    tables = {"Metrics": metrics, "Annotators": comparison.annotators, "Columns": comparison.columns}
    title = f"{model}, {comparison.metrics['rows']:.0f} predictions"
    mlflow.log_text(page(title, comparison.decision, tables, figures), "report.html")


def drift_figure(marked: pd.DataFrame) -> "Figure":
    """The population stability index of the columns that moved most; the columns that drifted are dark."""
    top = marked.head(MAX_BARS).iloc[::-1]
    figure, (axes,) = new_figure("Drift: dark columns changed, and not by chance", 1, 7, 1 + 0.25 * len(top))
    colors = ["#b03030" if drifted else "#b8c4d0" for drifted in top["drifted"]]
    axes.barh(range(len(top)), top["psi"], color=colors)
    axes.set_yticks(range(len(top)), [plain_text(name) for name in top["column"]])
    axes.set_xlabel("population stability index")
    return figure


def answers_figure(before: Sequence, after: Sequence, name: str) -> "Figure":
    """The champion's answers on the val part and in the window, as shares."""
    figure, (axes,) = new_figure("Answers: training data and window", 1, 7, 3)
    known, asked = pd.Series(before), pd.Series(after)
    if pd.api.types.is_float_dtype(known) and known.nunique() > MAX_BARS:
        axes.hist([known, asked.astype(float)], bins=30, density=True, label=["data", "window"])
    else:
        counts = {"data": known.value_counts(normalize=True), "window": asked.value_counts(normalize=True)}
        shares = pd.DataFrame(counts).fillna(0).sort_index().head(MAX_BARS)
        shares.set_axis([plain_text(label) for label in shares.index]).plot.bar(ax=axes, rot=0)
    axes.set_xlabel(plain_text(name))
    axes.legend()
    return figure


def page(title: str, decision: Decision, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, "Figure"]) -> str:
    """HTML with every text in it escaped."""
    blocks = []
    for heading, table in tables.items():
        shown = table.to_html(index=False, escape=True, border=0, float_format=lambda value: f"{value:.4g}")
        blocks.append(f"<h2>{html.escape(heading)}</h2>\n{shown}")
    for heading, figure in figures.items():
        data = BytesIO()
        figure.savefig(data, format="png")
        image = base64.b64encode(data.getvalue()).decode()
        blocks.append(f'<h2>{html.escape(heading)}</h2>\n<img alt="" src="data:image/png;base64,{image}">')
    texts = {"title": html.escape(title), "reason": html.escape(decision.reason), "body": "\n".join(blocks)}
    return PAGE.substitute(texts, decision="yes" if decision.retrain else "no")
