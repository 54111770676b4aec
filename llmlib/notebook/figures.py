"""One figure style for the whole book, and the few kinds of figure that chapters share.

Figures are SVG with a transparent background and neutral axes, so that they read in light and in dark; letters are
drawn as paths, so that they look the same everywhere; nothing in the file depends on the day or on the machine.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmlib.moe import RoutingStatistics


@functools.cache
def colours() -> dict[str, str]:
    """The book's palette by name: blue, orange, green, pink, red, violet, grey, and ink for axes and text."""
    return json.loads((Path(__file__).parents[1] / "palette.json").read_text())


def style(seed: int = 0) -> None:
    """Set the book's figure style, one thread, and the seed: the second line of every chapter."""
    import matplotlib as mpl
    from cycler import cycler

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    ink = colours()["ink"]
    mpl.rcdefaults()
    mpl.rcParams.update({
        "figure.figsize": (6.4, 3.2), "figure.facecolor": "none", "savefig.facecolor": "none",
        "figure.constrained_layout.use": True, "figure.dpi": 144,
        "axes.facecolor": "none", "axes.edgecolor": ink, "axes.labelcolor": ink, "axes.titlecolor": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.labelsize": 11,
        "axes.prop_cycle": cycler(color=[c for name, c in colours().items() if name not in ("grey", "ink")]),
        "axes.grid": True, "grid.color": ink, "grid.alpha": 0.2, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "text.color": ink, "xtick.color": ink, "ytick.color": ink, "xtick.labelsize": 10, "ytick.labelsize": 10,
        "legend.frameon": False, "legend.fontsize": 10, "font.family": "DejaVu Sans", "font.size": 11,
        "lines.linewidth": 1.8, "svg.fonttype": "path", "svg.hashsalt": "llmlib", "svg.image_inline": True,
    })  # fmt: skip
    _use_svg_in_notebooks()


def _use_svg_in_notebooks() -> None:
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        get_ipython().run_line_magic("matplotlib", "inline")
        set_matplotlib_formats("svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)


def _tint():
    """A colour map from nothing to the palette's blue, so that zero is whatever lies behind the figure."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    rgb = to_rgb(colours()["blue"])
    return LinearSegmentedColormap.from_list("blue", [(*rgb, 0.0), (*rgb, 1.0)])


def _signed_tint():
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    low, high = (to_rgb(colours()[name]) for name in ("orange", "blue"))
    stops = [(0, (*low, 1.0)), (0.5, (*low, 0.0)), (0.5, (*high, 0.0)), (1, (*high, 1.0))]
    return LinearSegmentedColormap.from_list("signed", stops)


def heatmap(
    values: Tensor | Mapping[str, Tensor], rows: Sequence[str] | None = None, columns: Sequence[str] | None = None, *,
    ylabel: str = "query", xlabel: str = "key", signed: bool = False, limit: float | None = None,
    height: float | None = None,
) -> None:  # fmt: skip
    """Draw one matrix, or several side by side under their titles, on one scale: from nothing (zero) to full colour.

    values   (rows, columns), or a mapping from title to such matrices
    limit    the value that gets the full colour; the largest one by default
    signed   negative values in orange, positive ones in blue
    """
    import matplotlib.pyplot as plt

    panels = dict(values) if isinstance(values, Mapping) else {"": values}
    panels = {title: m.detach().float() for title, m in panels.items()}
    limit = limit or max(float(m.nan_to_num(0).abs().max()) for m in panels.values()) or 1.0
    size = height or min(3.4, 6.4 / len(panels) + 0.3)
    _, axes = plt.subplots(1, len(panels), figsize=(6.4, size), squeeze=False)
    scale = {"cmap": _signed_tint(), "vmin": -limit} if signed else {"cmap": _tint(), "vmin": 0}
    for ax, (title, matrix) in zip(axes[0], panels.items(), strict=True):
        image = ax.imshow(matrix.numpy(), vmax=limit, interpolation="none", **scale)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel if ax is axes[0, 0] else "")
        ax.grid(visible=False)
        for axis, labels in ((ax.yaxis, rows), (ax.xaxis, columns)):
            if labels is not None:
                axis.set_ticks(range(len(labels)), labels, fontsize=8)
        ax.tick_params(labelleft=ax is axes[0, 0])
        if columns is not None and max(map(len, columns)) > 2:
            ax.tick_params(axis="x", rotation=90)
    bar = plt.colorbar(image, ax=list(axes[0]), shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)
    plt.show()


def lines(
    x, series: Mapping[str, object], *, xlabel: str, ylabel: str, log: str = "", title: str = "", ax=None,
    marker: str | None = None,
) -> None:  # fmt: skip
    """Draw one line for each entry of `series` over x; a line's label stands at its end, in its colour.

    log   "", "x", "y" or "xy": the axes that are logarithmic
    ax    draw into these axes instead of a new figure
    """
    import matplotlib.pyplot as plt

    own = ax is None
    if own:
        _, ax = plt.subplots()
    for label, y in series.items():
        ax.plot(_array(x), _array(y), label=label, marker=marker, markersize=4)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for axis in log:
        getattr(ax, f"set_{axis}scale")("log")
    if len(series) > 1:
        ax.legend()
    if own:
        plt.show()


def _array(values):
    return values.detach().numpy() if isinstance(values, Tensor) else values


def expert_loads(statistics: Mapping[str, RoutingStatistics]) -> None:
    """Draw each expert's share of the rows, one panel for each mixture, against the line where all would be even.

    A bar is what the router wanted, and its pale top what a capacity cut off.

    statistics  as `llmlib.moe.statistics(model)` returns them, or under titles of your own
    A panel's title says what a description of the figure needs: MaxVio, the router's entropy and its largest value, and
    what was dropped.
    """
    import matplotlib.pyplot as plt

    size = (6.4, 2.6 * math.ceil(len(statistics) / 2) + 0.2)
    _, axes = plt.subplots(math.ceil(len(statistics) / 2), min(len(statistics), 2), figsize=size, squeeze=False)
    for ax, (title, s) in zip(axes.flat, statistics.items(), strict=False):
        wanted, computed = ((rows / s.wanted.sum()).tolist() for rows in (s.wanted, s.counts))
        experts = range(len(wanted))
        if s.dropped:
            ax.bar(experts, wanted, color=colours()["blue"], alpha=0.35, label="dropped")
        ax.bar(experts, computed, color=colours()["blue"], label="computed")
        ax.axhline(1 / len(wanted), color=colours()["orange"], linestyle="--", label="even")
        ax.set(xlabel="expert", ylabel="share of the rows", ylim=(0, 1.35 * max(wanted)))  # room for the legend
        ax.set_title("\n".join(filter(None, [title, describe(s)])), fontsize=9)
        ax.legend(loc="upper right", ncols=3)
    for ax in axes.flat[len(statistics) :]:
        ax.axis("off")
    plt.show()


def describe(s: RoutingStatistics) -> str:
    """MaxVio, the router's entropy and the dropped share of a pass, in one line."""
    entropy = f"entropy {s.entropy:.2f} of {math.log(len(s.counts)):.2f}"
    return f"MaxVio {s.max_violation:.2f}, {entropy}, {s.dropped:.1%} dropped"


def boxes(parts: Mapping[str, tuple], arrows: Sequence[tuple] = (), *, width: float = 6.4, height: float = 2.4) -> None:
    """Draw labelled boxes and the arrows between them.

    parts   name → (x, y, text, colour name), the centre in inches from the lower left corner; "" draws the text alone
    arrows  (from, to) or (from, to, label), by box name
    """
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    drawn = {}
    for name, (x, y, text, colour) in parts.items():
        edge = colours()[colour] if colour else "none"
        box = {"boxstyle": "round,pad=0.5", "facecolor": (*_rgb(edge), 0.15) if colour else "none", "edgecolor": edge}
        drawn[name] = ax.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box)
    for start, end, *label in arrows:
        (x0, y0, *_), (x1, y1, *_) = parts[start], parts[end]
        ax.annotate(
            "", (x1, y1), (x0, y0),
            arrowprops={"arrowstyle": "-|>", "color": colours()["ink"], "patchA": drawn[start].get_bbox_patch(),
                        "patchB": drawn[end].get_bbox_patch(), "shrinkA": 1, "shrinkB": 1, "linewidth": 1.1},
        )  # fmt: skip
        if label:
            ax.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.08, label[0], ha="center", va="bottom", fontsize=9)
    plt.show()


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
