"""curves.png: the record of a run as a picture.

In: the lines of metrics.jsonl. Out: loss and learning rate over steps. Needs matplotlib and no display.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from pipeline.files import write_durably


def draw_curves(lines: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Plot training and validation loss (nats per token), learning rate and gradient norm into `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and not needed to train
    from matplotlib.figure import Figure

    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "val_loss" in line]
    if not training:
        return
    steps = [line["step"] for line in training]
    figure = Figure(figsize=(9, 6))
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    # fixed margins and labels without typesetting: training waits for the picture, and they take half of its time
    figure.subplots_adjust(left=0.1, right=0.9, top=0.94, bottom=0.09, hspace=0.08)
    top.plot(steps, [line["loss"] for line in training], color="tab:blue", linewidth=1, alpha=0.8, label="training")
    if validation:
        names = sorted({key for line in validation for key in line if key.startswith("val_loss/")})
        for name in names:  # of a blend, each dataset on its own
            points = [(line["step"], line[name]) for line in validation if name in line]
            top.plot(*zip(*points, strict=True), ".--", linewidth=0.8, alpha=0.8, label=name.removeprefix("val_loss/"))
        val_steps = [line["step"] for line in validation]
        top.plot(val_steps, [line["val_loss"] for line in validation], "o-", color="tab:orange", label="validation")
        last = validation[-1]
        top.annotate(
            f"{last['val_loss']:.3f}",
            (last["step"], last["val_loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
        )
    top.set(title=title, ylabel="loss (nats per token)")
    top.legend()
    bottom.plot(steps, [line["lr"] for line in training], color="tab:green")
    bottom.set(xlabel="step", ylabel="learning rate")
    norms = bottom.twinx()
    norms.plot(steps, [line["grad_norm"] for line in training], color="tab:gray", linewidth=0.7, alpha=0.6)
    norms.set(ylabel="gradient norm", yscale="log")
    for axis in (norms.yaxis, bottom.yaxis):
        axis.set_tick_params(labelsize="small")
    norms.yaxis.set(major_formatter=_plain_numbers(), minor_formatter=_plain_numbers())
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_durably(path, picture.getvalue())


def _plain_numbers() -> Any:
    """A formatter for a logarithmic axis: 0.6 and not 6e-01, where such an axis has a label at all."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return Plain()
