"""The report of an evaluation: JSON for programs, and for people one HTML page with its plots inside that needs nothing else."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from evaluator.domain.evaluation import Evidence, Judgement, Verdict
from evaluator.domain.statistics import Interval, calibration_error, reliability, roc_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "report.html.j2"

_CHALLENGER, _CHAMPION, _GUIDE = "#1f6f8b", "#c8742b", "#9a9a9a"


class Reports:
    """Makes both forms. The same evidence gives the same bytes, so that a repeated evaluation stores nothing new."""

    def json(self, judgement: Judgement, verdict: Verdict, evidence: Evidence) -> bytes:
        """The judgement, and the curves that the page draws. Numbers that are not finite are null."""
        report = {
            "judgement": asdict(judgement),
            "verdict": {"passed": not verdict.reason, "reason": verdict.reason},
            "comparison": asdict(verdict.comparison),
            "gates": [asdict(gate) for gate in verdict.gates],
            "latency": asdict(evidence.latency),
            "parity_error": evidence.parity_error,
            "models": {name: _curves(evidence, scores) for name, scores in _models(evidence)},
            "bootstrap": None if verdict.bootstrap is None else _histogram(verdict.bootstrap.differences),
        }
        return json.dumps(_finite(report), indent=1, sort_keys=True, allow_nan=False).encode()

    def html(self, judgement: Judgement, verdict: Verdict, evidence: Evidence) -> bytes:
        plots: list[tuple[str, _Draw]] = [("ROC curve", _roc), ("Calibration", _calibration), ("Scores", _scores)]
        if verdict.bootstrap is not None:
            plots.append(("Difference to the champion", partial(_differences, verdict.bootstrap)))
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string((resources.files(__package__) / TEMPLATE).read_text())
        page = template.render(
            judgement=judgement,
            verdict=verdict,
            comparison=verdict.comparison,
            latency=evidence.latency,
            share_of_ones=float(evidence.labels.mean()),
            plots=[(title, _svg(draw, title, verdict, evidence)) for title, draw in plots],
        )
        return page.encode()


def _models(evidence: Evidence) -> list[tuple[str, Any]]:
    both = [("challenger", evidence.challenger)]
    return both if evidence.champion is None else [*both, ("champion", evidence.champion)]


def _curves(evidence: Evidence, scores: Any) -> dict[str, Any]:
    false_rate, true_rate = roc_curve(evidence.labels, scores)
    return {
        "calibration_error": calibration_error(evidence.labels, scores),
        "reliability": [asdict(one) for one in reliability(evidence.labels, scores)],
        "roc": {"false_positive_rate": _rounded(false_rate), "true_positive_rate": _rounded(true_rate)},
        "scores": _histogram(scores, (0.0, 1.0)),
    }


def _histogram(values: Any, limits: tuple[float, float] | None = None) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=40, range=limits)
    return {"counts": counts.tolist(), "edges": _rounded(edges)}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


_Draw = Callable[["Axes", Verdict, Evidence], None]


def _svg(draw: _Draw, title: str, verdict: Verdict, evidence: Evidence) -> str:
    """One plot as an <svg> element, its text as text."""
    import matplotlib as mpl  # takes a second: only when a report is made
    from matplotlib.figure import Figure

    # The salt makes the ids inside follow from the plot alone, and different from those of the other plots in the page.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, verdict, evidence)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def _roc(axes: Axes, verdict: Verdict, evidence: Evidence) -> None:
    axes.plot([0, 1], [0, 1], color=_GUIDE, linewidth=1, linestyle=":")
    for (name, scores), color in zip(_models(evidence), (_CHALLENGER, _CHAMPION), strict=False):
        axes.plot(*roc_curve(evidence.labels, scores), color=color, label=name)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")


def _calibration(axes: Axes, verdict: Verdict, evidence: Evidence) -> None:
    axes.plot([0, 1], [0, 1], color=_GUIDE, linewidth=1, linestyle=":")
    for (name, scores), color in zip(_models(evidence), (_CHALLENGER, _CHAMPION), strict=False):
        bins = reliability(evidence.labels, scores)
        axes.plot([one.mean_score for one in bins], [one.share_of_ones for one in bins], color=color, marker="o", markersize=4, label=name)
    axes.set(xlabel="mean score of a tenth of the range", ylabel="share of ones in it", xlim=(0, 1), ylim=(0, 1))


def _scores(axes: Axes, verdict: Verdict, evidence: Evidence) -> None:
    edges = np.linspace(0, 1, 41)
    for (name, scores), color in zip(_models(evidence), (_CHALLENGER, _CHAMPION), strict=False):
        axes.stairs(np.histogram(scores, bins=edges)[0], edges, color=color, label=name)
    axes.set(xlabel="score", ylabel="rows", xlim=(0, 1))


def _differences(interval: Interval, axes: Axes, verdict: Verdict, evidence: Evidence) -> None:
    counts, edges = np.histogram(interval.differences, bins=40)
    axes.stairs(counts, edges, fill=True, color=_CHALLENGER, alpha=0.5)
    for bound in (interval.low, interval.high):
        if math.isfinite(bound):
            axes.axvline(bound, color=_CHALLENGER, linewidth=1)
    axes.axvline(verdict.gates[0].limit, color=_CHAMPION, linestyle="--", linewidth=1, label="the lower end must be right of this")
    axes.set(xlabel=f"{verdict.comparison.metric}: better than the champion by", ylabel="resamples")
