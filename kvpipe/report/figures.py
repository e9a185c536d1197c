"""The report's figures, each from finished artefacts to one matplotlib figure, or None where there is nothing to draw."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from kvpipe.report.alignment import token_alignment
from kvpipe.report.collect import LOSSLESS, ROLES, Results
from kvpipe.report.style import DASHES, INK, LIGHT, PAPER, SERIES, SOFT, WIDTH, on, styled
from kvpipe.report.wording import VERDICTS, number
from kvpipe.stats.metrics import METRICS, PRIMARY, Metric
from kvpipe.stats.scores import ALL

LINES_PER_PANEL = 4
KINDS = ("keys", "values")


def _grid(panels: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """So many panels, in so many columns, each so high."""
    columns = max(1, min(columns, panels))
    rows = ceil(panels / columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.55), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for empty in axes[panels:]:
        empty.set_visible(False)
    return figure, axes[:panels]


def _labels(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, size=8.5, color=INK)
    figure.supylabel(y, size=8.5, color=INK)


# ---------------------------------------------------------------- contrasts
def effects(results: Results) -> Figure | None:
    """Every arm against control: experiments and ablations, then baselines, then nulls."""
    titles = {"experiment": "experiments", "ablation": "ablations", "baseline": "baselines", "null": "nulls"}
    arms = [arm for arm in results.arm_order if arm != results.control]
    groups = {title: [arm for arm in arms if results.role(arm) == role] for role, title in titles.items()}
    return _forest(results, [(title, results.control, group) for title, group in groups.items() if group])


def ladder(results: Results) -> Figure | None:
    """Every arm against the arm that it is built on, and every other contrast whose reference is not control."""
    found: dict[str, list[str]] = {}
    for c in results.contrasts.values():
        if c.reference != results.control and c.arm in results.dag.arms and c.arm not in found.get(c.reference, []):
            found.setdefault(c.reference, []).append(c.arm)
    order = results.arm_order.index
    return _forest(results, [(f"against {r}", r, sorted(found[r], key=order)) for r in sorted(found, key=order)])


def _forest(results: Results, blocks: list[tuple[str, str, list[str]]]) -> Figure | None:
    """Blocks of (title, reference, arms): estimate, interval (thick), interval corrected for its family (thin)."""
    metrics = [m for m in METRICS.values() if m.main and m.scale != "logged" and _compared(results, m, blocks)][:2]
    if not metrics:
        return None
    rows = sum(len(arms) + 1.4 for _, _, arms in blocks)
    with styled():
        figure = Figure(figsize=(WIDTH, 0.235 * rows + 1.2), layout="constrained")
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        ticks, labels, y = [], [], 0.0
        for title, reference, arms in blocks:
            panels[0].text(-0.005, y, title, transform=panels[0].get_yaxis_transform(), ha="right", va="center",
                           weight="bold", color=SOFT, size=8)  # fmt: skip
            for arm in arms:
                y += 1
                for axes, metric in zip(panels, metrics, strict=True):
                    _interval(results, axes, y, arm, reference, metric)
                ticks.append(y)
                labels.append(arm)
            y += 1.4
        panels[0].set_yticks(ticks, labels)
        panels[0].set_ylim(y - 0.9, -0.7)
        for axes, metric in zip(panels, metrics, strict=True):
            axes.axvline(float(metric.is_ratio), color=SOFT, linewidth=1, zorder=0)
            side = "right" if metric.higher_is_better else "left"
            axes.set_title(f"{metric.label.capitalize()} ({side} is better)")
            axes.set_xlabel(
                "ratio to the reference, log scale" if metric.is_ratio else f"difference in {metric.change}"
            )
            if metric.is_ratio:
                axes.set_xscale("log")
                _ticks(axes.xaxis, axes.get_xlim(), (1, 1.1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
            axes.grid(axis="x", zorder=-1)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        used = [role for role in ROLES if any(results.role(a) == role for _, _, arms in blocks for a in arms)]
        handles = [Line2D([], [], color=LIGHT[role], marker="o", linewidth=3, label=role) for role in used]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(used), columnspacing=1.6)
    return figure


def _compared(results: Results, metric: Metric, blocks: list[tuple[str, str, list[str]]]) -> bool:
    pairs = ((arm, reference) for _, reference, arms in blocks for arm in arms)
    return any((*pair, metric.name, ALL) in results.contrasts for pair in pairs)


def _interval(results: Results, axes: Axes, y: float, arm: str, reference: str, metric: Metric) -> None:
    colour, contrast = LIGHT[results.role(arm)], results.contrasts.get((arm, reference, metric.name, ALL))
    if contrast is None:  # an ablation is compared with its base; here its mean stands without interval
        both = [results.arms.get((name, metric.name, ALL)) for name in (arm, reference)]
        if all(one is not None and one.known for one in both):
            own, other = (one.mean for one in both if one is not None)
            x = own / other if metric.is_ratio else metric.factor * (own - other)
            axes.plot([x], [y], color=colour, marker="D", markersize=4.5, markerfacecolor=PAPER)
            return
    if contrast is None or not contrast.tested:
        text = f" {VERDICTS[contrast.verdict]}" if contrast is not None and contrast.known else " no result"
        axes.text(float(metric.is_ratio), y, text, va="center", color=SOFT, size=8)
        return
    name, factor = ("ratio", 1.0) if metric.is_ratio else ("difference", metric.factor)
    low, high, low_plain, high_plain = (
        factor * getattr(contrast, f"{name}_{end}") for end in ("low", "high", "low_plain", "high_plain")
    )
    line: dict[str, Any] = {"color": colour, "solid_capstyle": "butt"}
    axes.plot([low, high], [y, y], marker="|", markersize=6, markeredgewidth=1.1, linewidth=1.1, **line)
    axes.plot([low_plain, high_plain], [y, y], linewidth=3.2, **line)
    axes.plot(
        [contrast.ratio if metric.is_ratio else factor * contrast.estimate], [y], color=colour, marker="o", markersize=6.5,
        markerfacecolor=PAPER if contrast.verdict == "undecided" else colour, markeredgewidth=1.5,
    )  # fmt: skip


def _ticks(axis: Any, limits: tuple[float, float], steps: tuple[float | int, ...] = (1, 1.5, 2, 3, 4, 5, 7)) -> None:
    """Round numbers on a logarithmic axis, eight at most."""
    low, high = limits
    inside = [m * 10.0**e for e in range(-5, 5) for m in steps if low <= m * 10.0**e <= high]
    if len(inside) < 3:
        inside = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    shown = inside[:: max(1, ceil(len(inside) / 8))]
    axis.set_ticks(shown, [f"{t:g}" for t in shown])
    axis.set_ticks([], minor=True)
    axis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------- curves
def curves(results: Results) -> Figure | None:
    """Validation loss against training tokens."""
    return _curves(results, "tokens", "training tokens (thousands)", 1e-3)


def equal_time(results: Results) -> Figure | None:
    """The same against the seconds of training."""
    return _curves(results, "seconds", "seconds of training", 1.0)


def _curves(results: Results, x: str, label: str, factor: float) -> Figure | None:
    """Mean over seeds with the range, a panel for each role; control in every panel."""
    found = {arm: curve for arm in results.arm_order if len(curve := results.curve(arm))}
    control = found.pop(results.control, None)
    panels = _panels(results, list(found)) or ([("", [])] if control is not None else [])
    if not panels:
        return None
    with styled():
        columns = min(3, len(panels)) if len(panels) != 4 else 2
        figure, grid = _grid(len(panels), columns, 2.75, sharex=True, sharey=True)
        for axes, (title, arms) in zip(grid, panels, strict=True):
            axes.set_title(title)
            axes.grid(axis="y", zorder=-1)
            for i, arm in enumerate(arms):
                _draw_curve(axes, found[arm], x, arm, SERIES[i], DASHES[i], 1.6)
            if control is not None:
                _draw_curve(axes, control, x, results.control, INK, "-", 2.2)
                axes.axhline(control["mean"].iloc[-1], color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
            axes.legend(loc="lower left")
        # the first fall from chance would flatten all that follows
        everything = [*found.values(), *([control] if control is not None else [])]
        late = pd.concat(c[c["tokens"] >= 0.1 * c["tokens"].max()] for c in everything)
        low, high = late["low"].min() / 1.06, late["high"].max() * 1.06
        grid[0].set_yscale("log")
        grid[0].set_ylim(low, high)
        _ticks(grid[0].yaxis, (low, high))
        grid[0].set_xlim(0, max(c[x].max() for c in everything))
        grid[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:,.5g}"))
        _labels(figure, label, "validation loss (nats per token, log scale)")
    return figure


def _panels(results: Results, arms: list[str]) -> list[tuple[str, list[str]]]:
    names = {"experiment": "Experiments", "ablation": "Ablations", "baseline": "Baselines", "null": "Nulls"}
    out = []
    for role, title in names.items():
        members = [arm for arm in arms if results.role(arm) == role]
        parts = ceil(len(members) / LINES_PER_PANEL)
        for i in range(parts):
            part = members[i * LINES_PER_PANEL : (i + 1) * LINES_PER_PANEL]
            out.append((title if parts == 1 else f"{title} ({i + 1} of {parts})", part))
    return out


def _draw_curve(axes: Axes, curve: pd.DataFrame, x: str, label: str, colour: str, dashes: Any, width: float) -> None:
    axes.fill_between(curve[x], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve[x], curve["mean"], color=colour, linestyle=dashes, linewidth=width, label=label)


def difficulty(results: Results) -> Figure | None:
    """The primary metric in each third of a task's items: control, the headline and the baselines."""
    found = results.by_difficulty
    arms = [a for a in results.compared if a in found.columns.get_level_values("arm")] if len(found.columns) else []
    if not arms:
        return None
    tasks = list(dict.fromkeys(found.index.get_level_values("task")))
    with styled():
        figure, grid = _grid(len(tasks), 3, 2.5, sharey=True)
        for axes, task in zip(grid, tasks, strict=True):
            axes.set_title(task)
            axes.grid(axis="y", zorder=-1)
            for i, arm in enumerate(arms):
                table = found.loc[task][arm]
                colour, dashes = (INK, "-") if arm == results.control else (SERIES[(i - 1) % 6], DASHES[(i - 1) % 6])
                axes.fill_between(range(len(table)), table.min(1), table.max(1), color=colour, alpha=0.15, linewidth=0)
                axes.plot(range(len(table)), table.mean(1), color=colour, linestyle=dashes, marker="o", label=arm)
            axes.set_xticks(range(len(table)), table.index)
            axes.set_ylim(bottom=0)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(arms))
        _labels(figure, "thirds of the test items, by the untrained student's loss", PRIMARY.label)
    return figure


# ---------------------------------------------------------------- layers
def _heat(axes: Axes, matrix: np.ndarray, highest: float, annotated: bool, lowest: float = 0.0) -> Any:
    """A map of numbers, written into its cells where there is room."""
    image = axes.pcolormesh(matrix, cmap="cividis", vmin=lowest, vmax=highest, edgecolors="face", linewidth=0.3)
    for (i, j), value in np.ndenumerate(matrix) if annotated else ():
        axes.text(j + 0.5, i + 0.5, number(value, 2), ha="center", va="center", size=7.5,
                  color=on(tuple(image.cmap(image.norm(value)))))  # fmt: skip
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _bar(figure: Figure, image: Any, axes: Iterable[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=list(axes), aspect=30, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)  # type: ignore[operator]


def layers(results: Results) -> Figure | None:
    """Debiased CKA of every student layer with every teacher layer, and which of them arms take."""
    panels = [(teacher, document, kind) for teacher, document in results.layer_maps.items() for kind in KINDS]
    if not panels:
        return None
    width, height = (max(document[f"{side}_layers"] for _, document, _ in panels) for side in ("src", "dst"))
    columns = min(len(panels), 4 if width <= 6 and len(panels) > 2 else 2)
    cell = float(np.clip((8.4 / columns - 0.3) / width, 0.13, 0.42))
    # similarities are often far below 1: the colours span what there is, and never less than 0.2
    highest = max(0.2, *(float(np.max(document["similarity"][kind])) for _, document, kind in panels))
    with styled():
        figure, grid = _grid(len(panels), columns, height * cell + 0.6)
        for axes, (teacher, document, kind) in zip(grid, panels, strict=True):
            image = _heat(axes, np.array(document["similarity"][kind]), highest, cell > 0.3)
            _mark_layers(results, axes, teacher, kind, cell / 0.42)
            axes.set_title(f"{teacher}: {kind}")
            axes.set_aspect("equal")
            every = 1 if cell > 0.22 else 2  # room for two digits
            axes.set_xticks(
                np.arange(0, document["src_layers"], every) + 0.5, [*map(str, range(0, document["src_layers"], every))]
            )
            axes.set_yticks(
                np.arange(0, document["dst_layers"], every) + 0.5, [*map(str, range(0, document["dst_layers"], every))]
            )
        _labels(figure, "teacher layer", "student layer")
        _bar(figure, image, grid, "debiased linear CKA")
    return figure


def _mark_layers(results: Results, axes: Axes, teacher: str, kind: str, unit: float) -> None:
    """Squares for layers chosen by similarity, a dot in the corner for those of depth or a list."""
    chosen: dict[str, set[tuple[int, int]]] = {"cka": set(), "": set()}
    for arm, plan in results.plans(teacher):
        side, rule = KINDS.index(kind), "cka" if arm.layer.kind == "cka" else ""
        for layer, (index, beta) in enumerate(zip(plan.index[side].tolist(), plan.beta[side].tolist(), strict=True)):
            chosen[rule] |= {(layer, i) for i, b in zip(index, beta, strict=True) if b > 0}
    # white on black stands out on every colour of the map
    for i, j in sorted(chosen["cka"]):
        x, y = np.array([0.08, 0.92, 0.92, 0.08, 0.08]) + j, np.array([0.08, 0.08, 0.92, 0.92, 0.08]) + i
        for colour, width in (("#000000", 3.4 * unit + 0.6), ("#fefefe", 1.8 * unit)):
            axes.plot(x, y, color=colour, linewidth=width, solid_joinstyle="miter", solid_capstyle="projecting")
    for i, j in sorted(chosen[""]):
        axes.plot([j + 0.8], [i + 0.22], linestyle="", marker="o", markersize=5 * unit, markerfacecolor="#fefefe",
                  markeredgecolor="#000000", markeredgewidth=0.8)  # fmt: skip


def layer_loss(results: Results) -> Figure | None:
    """The loss of each student layer over the steps, of keys and of values: the headline's, or the first arm's that has
    one."""
    shown = next(
        (arm for arm in results.shown_first if any(results.layer_losses(arm, kind) is not None for kind in KINDS)), ""
    )
    tables = {kind: table for kind in KINDS if shown and (table := results.layer_losses(shown, kind)) is not None}
    if not tables:
        return None
    with styled():
        count = max(len(table) for table in tables.values())
        figure, grid = _grid(len(tables), 2, float(np.clip(0.3 * count, 1.2, 4)))
        for axes, (kind, table) in zip(grid, tables.items(), strict=True):
            values = table.to_numpy()
            image = _heat(axes, values, float(np.nanmax(values)), False)
            axes.set_title(f"{shown}: {kind}")
            every = max(1, ceil(table.shape[1] / 8))
            axes.set_xticks(np.arange(0, table.shape[1], every) + 0.5, table.columns[::every])
            axes.set_yticks(np.arange(len(table)) + 0.5, table.index)
            _bar(figure, image, [axes], "loss")
        _labels(figure, "step", "student layer")
    return figure


# ---------------------------------------------------------------- fusion
def fusion(results: Results) -> Figure | None:
    """Share of each teacher in the fused target, one bar per arm and task."""
    weights = results.fusion_weights
    if weights.empty:
        return None
    teachers = [c for c in weights.columns if c not in ("arm", "task")]
    arms = list(dict.fromkeys(weights["arm"]))
    with styled():
        figure = Figure(figsize=(WIDTH, 0.24 * len(weights) + 0.2 * len(arms) + 0.9), layout="constrained")
        axes = figure.subplots()
        y, ticks, labels = 0.0, [], []
        for arm in arms:
            for row in weights[weights["arm"] == arm].to_dict("records"):
                start = 0.0
                for i, teacher in enumerate(teachers):
                    share = row[teacher]
                    if not np.isfinite(share):
                        continue
                    axes.barh(y, share, left=start, height=0.78, color=SERIES[i % 6], edgecolor=PAPER)
                    if share > 0.06:
                        axes.text(start + share / 2, y, number(share, 2), ha="center", va="center", color=PAPER, size=8)
                    start += share
                ticks.append(y)
                labels.append(f"{arm} · {row['task']}")
                y += 1
            y += 0.45
        axes.set_yticks(ticks, labels)
        axes.set_ylim(y - 0.8, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xlabel("mean weight of the teacher")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        handles = [Line2D([], [], color=SERIES[i % 6], linewidth=6, label=t) for i, t in enumerate(teachers)]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(teachers))
    return figure


def router(results: Results) -> Figure | None:
    """Weight of each teacher by training example and student layer, of arms that weigh examples of a task apart."""
    panels = [(arm, t, found) for arm, found in results.routers.items() for t in found["teachers"]]
    # of two teachers the second's weight is what the first leaves
    panels = [p for p in panels if len(p[2]["teachers"]) > 2 or p[1] == p[2]["teachers"][0]]
    if not panels:
        return None
    with styled():
        figure, grid = _grid(len(panels), 4, 3.2)
        for axes, (arm, teacher, found) in zip(grid, panels, strict=True):
            matrix = np.array(found["weights"])[:, :, found["teachers"].index(teacher)]
            order = sorted(range(len(matrix)), key=lambda row: found["tasks"][row])
            image = _heat(axes, matrix[order], 1.0, False)
            axes.set_title(f"{arm}: {teacher}")
            tasks = [found["tasks"][row] for row in order]
            firsts = [i for i, task in enumerate(tasks) if i == 0 or task != tasks[i - 1]]
            for first in firsts[1:]:
                axes.axhline(first, color="#fefefe", linewidth=1.5)
            middles = [(a + b) / 2 for a, b in zip(firsts, [*firsts[1:], len(tasks)], strict=True)]
            axes.set_yticks(middles, [tasks[i] for i in firsts], rotation=90, va="center")
            axes.set_xticks(np.arange(matrix.shape[1]) + 0.5, [*map(str, range(matrix.shape[1]))])
        _labels(figure, "student layer", "training examples, by task")
        _bar(figure, image, grid, "weight of the teacher")
    return figure


# ---------------------------------------------------------------- fit
def fit(results: Results) -> Figure | None:
    """What the projected target loses of the teacher's keys and values, and how far the student's attention outputs move
    when it takes the place of the student's own cache, per student layer; a panel for each fit that loses anything."""
    fits = {name: curves for name, curves in results.fit_curves.items() if name not in results.lossless_fits}
    if not fits:
        return None
    shown = [t for t in results.dag.teachers if any(t == teacher for found in fits.values() for teacher, _ in found)]
    colours = {teacher: SERIES[i % 6] for i, teacher in enumerate(shown)}
    kinds: dict[str, dict[str, Any]] = {
        "keys": {"linestyle": DASHES[1], "marker": "o"},
        "values": {"linestyle": "-", "marker": "s"},
        "attention output": {"linestyle": ":", "marker": "^"},
    }
    with styled():
        figure, grid = _grid(len(fits), 4, 1.75, sharey=True)
        for axes, (name, found) in zip(grid, fits.items(), strict=True):
            axes.set_title(textwrap.fill(", ".join(results.fit_users(name)), 30), size=8.5)
            for (teacher, kind), values in found.items():
                axes.plot(
                    range(len(values)),
                    np.maximum(values, LOSSLESS),
                    color=colours[teacher],
                    markersize=4,
                    clip_on=False,
                    **kinds[kind],
                )
            axes.set_xticks(range(len(values)) if len(values) < 12 else range(0, len(values), 4))
            axes.grid(axis="y", zorder=-1)
        grid[0].set_yscale("log")
        _ticks(grid[0].yaxis, grid[0].get_ylim(), (1, 3))
        handles = [Line2D([], [], color=colour, linewidth=5, label=teacher) for teacher, colour in colours.items()]
        handles += [Line2D([], [], color=INK, markersize=4, label=kind, **style) for kind, style in kinds.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.6)
        _labels(figure, "student layer", "lost: 1 − explained variance, 1 − cosine")
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "effects": effects,
    "ladder": ladder,
    "curves": curves,
    "equal_time": equal_time,
    "difficulty": difficulty,
    "fusion": fusion,
    "router": router,
    "layers": layers,
    "layer_loss": layer_loss,
    "fit": fit,
    "alignment": token_alignment,
}
"""Every figure by the name of its file."""
