"""Pictures of the evidence: a PNG beside each JSON that has something to see. `python -m benchmarks.plots docs/evidence`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHED = 20  # steps of a curve


def draw_curves(axes: Axes, curves: dict[str, dict[str, list[float]]]) -> None:
    """Training loss against tokens, each a running mean."""
    for name, curve in curves.items():
        width = max(1, min(SMOOTHED, len(curve["loss"]) // 8))
        means = [sum(curve["loss"][t - width : t]) / width for t in range(width, len(curve["loss"]) + 1)]
        axes.plot([each / 1e3 for each in curve["tokens"][width - 1 :]], means, label=name, linewidth=1.2)
    axes.set_xlabel("thousand tokens")
    axes.set_ylabel("training loss, nats a token")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def draw_ratios(axes: Axes, ratios: dict[str, dict[str, float]], start: str, *, logarithmic: bool = False) -> None:
    """Bars of the ratios whose names begin with `start`: medians, with quartiles."""
    chosen = {name.removeprefix(start).strip(): ratio for name, ratio in ratios.items() if name.startswith(start)}
    medians = [ratio["median"] for ratio in chosen.values()]
    around = [
        [ratio["median"] - ratio["low"] for ratio in chosen.values()],
        [ratio["high"] - ratio["median"] for ratio in chosen.values()],
    ]
    axes.barh(list(chosen), medians, xerr=around, color="#4c72b0", height=0.6)
    for index, median in enumerate(medians):
        axes.text(median, index, f" {median:.3g}", va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    if logarithmic:
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.15)
    axes.set_title(start.strip(" :"), fontsize=9)


def compression(report: dict[str, Any]) -> Figure:
    figure, (bytes_axes, loss_axes, curves) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    draw_ratios(bytes_axes, report["ratios"], "bytes:", logarithmic=True)
    draw_ratios(loss_axes, report["ratios"], "loss:")
    draw_curves(curves, report["curves"])
    return figure


def consistency(report: dict[str, Any]) -> Figure:
    """Of what was measured: speed, loss or both."""
    starts = [start for start in ("speed:", "loss:") if any(name.startswith(start) for name in report["ratios"])]
    has_curves = "curves" in report
    figure, axes = pyplot.subplots(
        1, len(starts) + has_curves, figsize=(5 * (len(starts) + has_curves), 4), layout="constrained", squeeze=False
    )
    for each, start in zip(axes[0], starts, strict=False):
        draw_ratios(each, report["ratios"], start)
    if has_curves:
        draw_curves(axes[0][-1], report["curves"])
    return figure


def links(report: dict[str, Any]) -> Figure:
    starts = sorted({f"{name.partition(':')[0]}:" for name in report["ratios"]}, key=lambda each: -float(each.split()[0]))
    figure, axes = pyplot.subplots(1, len(starts), figsize=(7 * len(starts), 4), layout="constrained", squeeze=False)
    for each, start in zip(axes[0], starts, strict=True):
        draw_ratios(each, report["ratios"], start, logarithmic=True)
    return figure


PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "compression": compression,
    "consistency": consistency,
    "consistency-at-3e-3": consistency,
    "links": links,
}


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m benchmarks.plots FOLDER, of the JSON files", file=sys.stderr)
        return 2
    for name, draw in PICTURES.items():
        file = Path(argv[0]) / f"{name}.json"
        if file.is_file():
            figure = draw(json.loads(file.read_text(encoding="utf-8")))
            figure.savefig(file.with_suffix(".png"), dpi=110)
            print(file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
