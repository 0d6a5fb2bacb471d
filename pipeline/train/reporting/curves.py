"""curves.png: the record of a run as a picture.

In: the lines of metrics.jsonl. Out: loss, learning rate and gradient norm over steps. Needs matplotlib and no display.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import write_durably

FEW_POINTS = 20
"""Below this, a smoothed curve would only hide the points."""


def draw_curves(lines: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Plot training and validation loss (nats per token), learning rate and gradient norm into `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and not needed to train
    from matplotlib.figure import Figure

    training = [line for line in lines if "loss" in line]
    if not training:
        return
    figure = Figure(figsize=(9, 7))
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[4, 1, 1])
    # fixed margins and labels without typesetting: training waits for the picture, and they take half of its time
    figure.subplots_adjust(left=0.1, right=0.97, top=0.95, bottom=0.12, hspace=0.12)
    _draw_losses(top, training, [line for line in lines if "val_loss" in line])
    top.set(title=title, ylabel="loss (nats per token)")
    steps = [line["step"] for line in training]
    middle.plot(steps, [line["lr"] for line in training], color="tab:green")
    middle.set(ylabel="learning rate", ylim=(0, None))
    norms = [line["grad_norm"] for line in training]
    bottom.plot(steps, norms, color="tab:gray", linewidth=0.7, alpha=0.5)
    bottom.plot(steps, smoothed(norms), color="black", linewidth=1.2)
    bottom.set(xlabel="step", ylabel="gradient norm", yscale="log")
    bottom.yaxis.set(major_formatter=_plain_numbers(), minor_formatter=_plain_numbers())
    bottom.xaxis.set(major_formatter=_whole_numbers())
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize="small", which="both")
        axes.yaxis.label.set_size("small" if axes is not top else "medium")
    figure.align_ylabels([top, middle, bottom])
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize="small")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_durably(path, picture.getvalue())


def smoothed(values: list[float]) -> list[float]:
    """The mean around each point: of a twentieth of the points before it and as many after it.

    So a steep beginning stays steep, and the noise of a long run goes. What is not a number is left out.
    """
    if len(values) < FEW_POINTS:
        return values
    found, places = np.array(values), np.arange(len(values))
    known = np.isfinite(found)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, found, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    half = np.maximum(places // 20, 1)
    first, stop = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means: list[float] = ((sums[stop] - sums[first]) / np.maximum(counts[stop] - counts[first], 1)).tolist()
    return means


def _draw_losses(axes: Any, training: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    """Raw and smoothed training loss; validation loss with its last value, of a blend also for each dataset."""
    steps, losses = [line["step"] for line in training], [line["loss"] for line in training]
    axes.plot(steps, losses, color="tab:blue", linewidth=0.8, alpha=0.35, label="training")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.6, label="training, smoothed")
    names = sorted({key for line in validation for key in line if key.startswith("val_loss/")})
    for name in names:
        points = [(line["step"], line[name]) for line in validation if name in line]
        axes.plot(*zip(*points, strict=True), ".--", linewidth=0.8, alpha=0.8, label=name.removeprefix("val_loss/"))
    if validation:
        last = validation[-1]
        values = [line["val_loss"] for line in validation]
        axes.plot([line["step"] for line in validation], values, "o-", color="tab:orange", label="validation")
        axes.annotate(
            f"{last['val_loss']:.3f}",
            (last["step"], last["val_loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
        )
    raw = sorted(loss for loss in losses if loss == loss)
    outliers = len(raw) // 100  # at either end: a spike does not squeeze the rest
    shown = [*raw[outliers : len(raw) - outliers], *(line["val_loss"] for line in validation)]
    if shown:
        room = 0.06 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - room, max(shown) + room)


def _whole_numbers() -> Any:
    """A formatter that groups thousands: 19,000."""
    from matplotlib.ticker import StrMethodFormatter

    return StrMethodFormatter("{x:,.0f}")


def _plain_numbers() -> Any:
    """A formatter for a logarithmic axis: 0.6 and not 6e-01, where such an axis has a label at all."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return Plain()
