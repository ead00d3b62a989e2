"""The sections of RESULTS.md: groups of runs and their relations -> Markdown."""

import numpy as np
from analysis import (
    BOTH,
    COVERAGE,
    MEASURED,
    SHARES,
    TARGETS,
    forgetting_so_far,
    left_out_error,
    method_agreement,
    predictors_of,
    relation,
    seed_agreement,
    seed_of,
)

SIGNIFICANT = 0.05
LEAST_FORGETTING = 0.005  # below half a point a share of it is a share of noise
POINT_TARGETS = ("gain", "mean forgetting")  # of the tables in points
LABELS = ["level", "method", "learning rate"]


def heading(outcomes, n_unfinished, command):
    def listed(values):
        return ", ".join(f"{v}" for v in sorted(set(values)))

    versions = {(name, v) for o in outcomes for name, v in o.versions.items()}
    left_out = f"; {n_unfinished} unfinished runs are left out" if n_unfinished else ""
    return (
        "# What the recorded runs say\n\n"
        f"Written by `{command}` from {len(outcomes)} runs{left_out}: "
        f"{len({o.task for o in outcomes})} tasks, methods {listed(o.method for o in outcomes)}; "
        f"seeds {listed(seed_of(o) for o in outcomes)}; "
        f"steps {listed(o.recipe.get('steps', '?') for o in outcomes)}; "
        f"models {listed(o.model for o in outcomes)}. "
        f"Libraries of the runs: {', '.join(f'{n} {v}' for n, v in sorted(versions))}.\n\n"
        "Seeds of a task are averaged first, so n is the number of tasks. Gentle is the method's "
        "lower learning rate, harsh the higher, `both` the mean of the two, short a third of the "
        "steps. `–`: fewer than three tasks, or nothing varies. Points are hundredths of "
        "accuracy.\n\n"
        "![IIMM and gain](iimm_and_gain.png)\n\n![IIMM and forgetting](iimm_and_forgetting.png)"
        "\n\n![Forgetting over the run](forgetting_over_the_run.png)\n\n"
        f"Lines are least squares, shades their {COVERAGE:.0%} prediction bands (Student t); "
        "scales differ from panel to panel. The last picture shows means over the runs."
    )


def summary(groups, relations):
    """How many relations pass p < 0.05, beside how many would if nothing were related."""
    single = [relations[g.method, g.level] for g in groups if g.level != BOTH]
    rows, total, passed, strict = [], 0, 0, 0
    everything = [r for table in single for r in table.values() if r is not None]
    for name in dict.fromkeys(name for table in single for _, name in table):
        row = [name]
        for target in TARGETS:
            found = [table[target, name] for table in single if table.get((target, name))]
            hits = sum(r.p < SIGNIFICANT for r in found)
            strict += sum(r.p < SIGNIFICANT / len(everything) for r in found)
            total, passed = total + len(found), passed + hits
            row.append(f"{hits} of {len(found)}")
        rows.append(row)
    text = (
        f"Of {total} pairs of predictor and target (each method at each learning rate), {passed} "
        f"have p < {SIGNIFICANT}; {SIGNIFICANT * total:.0f} would if nothing were related and the "
        f"pairs were independent, which they are not: methods share the tasks, and predictors "
        f"resemble one another. With Bonferroni's correction {strict} remain."
    )
    return f"## How many relations show\n\n{text}\n\n" + table(["predictor", *TARGETS], rows)


def explained_table(groups, relations):
    """R² of the gain, one row per predictor, one column per method: what to look at first."""
    chosen = [g for g in groups if g.level == BOTH] or groups
    names = list(dict.fromkeys(n for g in chosen for _, n in relations[g.method, g.level]))
    rows = []
    for name in names:
        found = [relations[g.method, g.level]["gain", name] for g in chosen]
        rows.append([name, *(bold(f"{r.r2:.2f}", r.p < SIGNIFICANT) if r else "–" for r in found)])
    text = (
        "R² of the gain over the tasks, learning rates together; bold: p < 0.05. IIMM is the mean "
        "of inter and intra. H-Score, GBC, LogME and TransRate are transfer scores of the "
        "untouched model's test embeddings. The linear probe is fitted to the training images; its "
        "predictor is its accuracy minus zero-shot accuracy. One small model: no promise for "
        "another."
    )
    head = ["predictor", *(g.method for g in chosen)]
    return f"## How much each explains\n\n{text}\n\n" + table(head, rows)


def outcome_table(groups):
    rows = []
    for group in groups:
        row = [*labels(group), len(group.runs)]
        for target in POINT_TARGETS:
            values = list(group.per_task(TARGETS[target]).values())
            span = [points(f(values)) for f in (np.mean, min, max)] if values else []
            row.append("{} ({} to {})".format(*span) if span else "–")
        rows.append(row)
    head = [*LABELS, "runs", *(f"{t}, mean (lowest to highest task)" for t in POINT_TARGETS)]
    return "## Gain and forgetting, points\n\n" + table(head, rows)


def relation_tables(groups, relations):
    """R² and Kendall's tau of every predictor, one table per target each."""
    shown = [
        ("R²", "bold: p < 0.05", lambda r: bold(f"{r.r2:.2f}", r.p < SIGNIFICANT)),
        ("Kendall's τ", "the sign is the direction", lambda r: f"{r.tau:+.2f}"),
    ]
    for target in TARGETS:
        for title, note, cell in shown:
            names = [name for t, name in next(iter(relations.values()), {}) if t == target]
            rows = []
            for group in groups:
                found = [relations[group.method, group.level][target, name] for name in names]
                n = max((r.n for r in found if r), default="–")
                rows.append([*labels(group), n, *(cell(r) if r else "–" for r in found)])
            yield f"## {title} against {target} ({note})\n\n" + table([*LABELS, "n", *names], rows)


def extreme_table(groups):
    """How much of IIMM's R² hangs on the one task whose IIMM is farthest from the others'."""
    rows = []
    for group in groups:
        iimm = group.per_task(MEASURED["IIMM"])
        middle = np.mean(list(iimm.values()))
        extreme = max(iimm, key=lambda task: abs(iimm[task] - middle), default=None)
        rest = {task: x for task, x in iimm.items() if task != extreme}
        found = [relation(rest, group.per_task(value)) for value in TARGETS.values()]
        cells = [bold(f"{r.r2:.2f}", r.p < SIGNIFICANT) if r else "–" for r in found]
        rows.append([*labels(group), len(rest), extreme, *cells])
    return "## R² of IIMM without the task of the most extreme IIMM (bold: p < 0.05)\n\n" + table(
        [*LABELS, "n", "left out", *TARGETS], rows
    )


def left_out_tables(groups, scores):
    for target in POINT_TARGETS:
        rows = []
        for group in groups:
            y = group.per_task(TARGETS[target])
            predictors = predictors_of(group, scores)
            mean = left_out_error(None, y)
            errors = [left_out_error(x, y) for x in predictors.values()]
            cells = ["–" if e is None else bold(f"{100 * e:.1f}", e < mean) for e in errors]
            plain = "–" if mean is None else f"{100 * mean:.1f}"
            rows.append([*labels(group), len(y), plain, *cells])
        names = predictors_of(groups[0], scores) if groups else ()
        yield (
            f"## Mean absolute error of forecasting {target}, points\n\nEach task from a line "
            "through the others; bold: better than the plain mean of the others.\n\n"
            + table([*LABELS, "n", "plain mean", *names], rows)
        )


def seed_table(groups):
    rows = []
    for group in groups:
        if group.level == BOTH:
            continue
        row = labels(group)
        for target in POINT_TARGETS:
            found = seed_agreement(group, TARGETS[target])
            row += [found[0], f"{found[1]:+.2f}", f"{100 * found[2]:.1f}"] if found else ["–"] * 3
        rows.append(row)
    head = [f"{c}, {t}" for t in POINT_TARGETS for c in ("n", "correlation", "mean gap, points")]
    return "## Do two seeds agree on the tasks?\n\n" + table([*LABELS, *head], rows)


def method_table(groups):
    rows = []
    for level in dict.fromkeys(g.level for g in groups):
        chosen = [g for g in groups if g.level == level]
        found = {t: method_agreement(chosen, TARGETS[t]) for t in POINT_TARGETS}
        for a, b in found[POINT_TARGETS[0]]:
            cells = [found[t][a, b] for t in POINT_TARGETS]
            n = max((r.n for r in cells if r), default="–")
            rows.append([level, a, b, n, *(f"{r.r2:.2f}" if r else "–" for r in cells)])
    head = ["level", "method", "method", "n", *(f"R² of {t}" for t in POINT_TARGETS)]
    return "## Does one method's outcome tell another's on the same task?\n\n" + table(head, rows)


def share_table(groups):
    rows = []
    for group in groups:
        curve = forgetting_so_far(group)
        if curve is None or group.level == BOTH:
            continue
        *so_far, final = curve
        enough = final >= LEAST_FORGETTING
        cells = [f"{100 * f / final:.0f} %" if enough else "–" for f in so_far]
        rows.append([*labels(group), *cells, points(final)])
    head = [*LABELS, *(f"at {s:.0%}" for s in SHARES), "final, points"]
    return (
        "## Share of the final mean forgetting that was reached early\n\nMean over the runs now, "
        "by mean over the runs at the end; `–`: less than half a point was forgotten in the end."
        "\n\n" + table(head, rows)
    )


def predictor_table(groups, scores):
    """The predictors themselves, task by task."""
    predictors = predictors_of(groups[0], scores) if groups else {}
    tasks = sorted({t for g in groups for o in g.runs for t in [o.task]})
    rows = [[t, *(f"{x[t]:.3f}" if t in x else "–" for x in predictors.values())] for t in tasks]
    return "## The predictors, before training\n\n" + table(["task", *predictors], rows)


def line_table(groups, relations):
    """Slope and p of every line, folded away."""
    rows = []
    for group in groups:
        found = relations[group.method, group.level]
        for name in dict.fromkeys(name for _, name in found):
            lines = [found[target, name] for target in TARGETS]
            cells = [f"{r.slope:.3g} (p {r.p:.2g}, n {r.n})" if r else "–" for r in lines]
            rows.append([*labels(group), name, *cells])
    body = table([*LABELS, "predictor", *TARGETS], rows)
    return (
        "## Slopes\n\nIn fractions of accuracy per unit of the predictor.\n\n"
        f"<details><summary>{len(rows)} rows</summary>\n\n{body}\n\n</details>"
    )


def labels(group):
    return [group.level, group.method, ", ".join(f"{rate:g}" for rate in group.rates)]


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def points(fraction):
    return f"{100 * fraction:+.1f}"


def bold(text, yes):
    return f"**{text}**" if yes else text
