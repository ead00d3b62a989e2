"""The study's pictures: IIMM against gain and forgetting, and forgetting over the run."""

from io import BytesIO

import numpy as np
from analysis import (
    BOTH,
    LEVELS,
    MEASURED,
    SHARES,
    TARGETS,
    forgetting_so_far,
    groups_of,
    paired,
    prediction_band,
    relation,
)
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

MARKERS = "osD^v<>PX*ph"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a6a00", "#56b4e9")  # tell apart for most
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
STYLES = {"gentle": ("#0072b2", "-"), "harsh": ("#d55e00", "--")}


def draw(outcomes, folder):
    """Write the three pictures; returns their paths."""
    groups = [g for g in groups_of(outcomes) if g.level in LEVELS]
    figures = {
        "iimm_and_gain.png": scatter(groups, "gain"),
        "iimm_and_forgetting.png": scatter(groups, "mean forgetting"),
        "forgetting_over_the_run.png": over_the_run(groups),
    }
    for name, figure in figures.items():
        buffer = BytesIO()
        figure.savefig(buffer, dpi=100)
        # 64 colours are plenty, and make it a third of the size.
        Image.open(buffer).convert("RGB").quantize(64).save(folder / name, optimize=True)
    return [folder / name for name in figures]


def scatter(groups, target):
    """A panel per method, each with its own scale; a shape per task, hollow for the harsh rate."""
    methods = list(dict.fromkeys(g.method for g in groups))
    tasks = sorted({o.task for g in groups for o in g.runs})
    n_rows = -(-(len(methods) + 1) // 3)  # one more panel holds the legend
    figure = Figure(figsize=(11, 3.6 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, 3, sharex=True, squeeze=False).flat
    for panel, method in zip(panels, methods, strict=False):
        own = [g for g in groups if g.method == method]
        notes = [scatter_level(panel, group, target, tasks) for group in own]
        panel.set_title("\n".join([method, *filter(None, notes)]), fontsize=9)
        limit_to_points(panel, own, target)
        panel.axhline(0, color="lightgrey", lw=0.8, zorder=0)
        panel.set_xlabel("IIMM before training")
        panel.set_ylabel(f"{target} (points)")
        panel.tick_params(labelbottom=True)
    for panel in panels[len(methods) :]:
        panel.axis("off")
    handles, names = legend_entries(panels[0], tasks)
    panels[len(methods)].legend(handles, names, loc="center", fontsize=9, frameon=False, ncols=1)
    return figure


def scatter_level(panel, group, target, tasks):
    """Points, line and band of one level; returns its R² in words."""
    colour, line_style = STYLES[group.level]
    iimm, outcome = group.per_task(MEASURED["IIMM"]), group.per_task(TARGETS[target])
    for task in sorted(set(iimm) & set(outcome)):
        panel.plot(
            iimm[task],
            100 * outcome[task],
            MARKERS[tasks.index(task) % len(MARKERS)],
            color=colour,
            markerfacecolor=colour if group.level == LEVELS[0] else "white",
            ms=6,
        )
    line = relation(iimm, outcome)
    if line is None:
        return ""
    x, y = paired(iimm, outcome)
    grid = np.linspace(x.min(), x.max(), 50)
    middle = line.intercept + line.slope * grid
    panel.plot(grid, 100 * middle, ls=line_style, color=colour, lw=1.5)
    half = prediction_band(x, y, grid)
    low, high = 100 * (middle - half), 100 * (middle + half)
    panel.fill_between(grid, low, high, color=colour, alpha=0.12, lw=0)
    for edge in (low, high):  # told apart without colour
        panel.plot(grid, edge, ls=line_style, color=colour, lw=0.6)
    return f"{group.level}: R² {line.r2:.2f}, p {line.p:.2f}"


def limit_to_points(panel, groups, target):
    """Bands of a few points are wide: they may leave the picture, the points may not."""
    values = [100 * v for g in groups for v in g.per_task(TARGETS[target]).values()] or [0.0]
    room = 0.6 * max(np.ptp(values), 1)
    panel.set_ylim(min(values) - room, max(values) + room)


def legend_entries(panel, tasks):
    handles = [
        panel.plot([], [], MARKERS[i % len(MARKERS)], color="black", ls="")[0]
        for i in range(len(tasks))
    ]
    names = list(tasks)
    for level, (colour, line_style) in STYLES.items():
        face = colour if level == LEVELS[0] else "white"
        handles += panel.plot([], [], "o", ls=line_style, color=colour, markerfacecolor=face)
        names.append(f"{level} learning rate")
    return handles, names


def over_the_run(groups):
    """Mean forgetting over the share of the steps done, a line per method, a panel per level."""
    levels = [level for level in LEVELS if any(g.level == level for g in groups)]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    shares = (0.0, *SHARES)
    for panel, level in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels, strict=True):
        for i, group in enumerate(g for g in groups if g.level == level != BOTH):
            curve = forgetting_so_far(group, shares)
            if curve is not None:
                style = {
                    "marker": MARKERS[i % len(MARKERS)],
                    "color": COLOURS[i % len(COLOURS)],
                    "ls": LINES[i % len(LINES)],
                }
                name = f"{group.method}, {group.rates[0]:g}"
                panel.plot((*shares, 1.0), 100 * curve, label=name, **style)
        panel.set_title(f"{level} learning rate")
        panel.set_xlabel("share of the steps")
        panel.xaxis.set_major_formatter(PercentFormatter(1))
        panel.set_ylabel("mean forgetting (points)")
        panel.axhline(0, color="lightgrey", lw=0.8, zorder=0)
        panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return figure
