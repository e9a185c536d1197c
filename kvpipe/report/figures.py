"""The report's charts, each from finished artefacts to one inline SVG."""

from __future__ import annotations

import textwrap
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvpipe.align.layermap import at_kept_depth, layer_plan
from kvpipe.report.collect import ROLES, Contrast, Results
from kvpipe.report.svg import DASHES, INK, PAPER, SERIES, SOFT, STAND_IN, WIDTH, Picture, inline, styled
from kvpipe.report.wording import VERDICTS, listed, number
from kvpipe.stats.metrics import METRICS, PRIMARY
from kvpipe.stats.scores import ALL

LINES_PER_PANEL = 4
FOREST = (PRIMARY.name, "accuracy")


# ---------------------------------------------------------------- contrasts
def forest(results: Results) -> Picture | None:
    """Contrasts of bits per byte (ratio) and accuracy (points): estimate, interval (thick), corrected interval (thin)."""
    blocks: list[tuple[str, list[str]]] = []
    references = {c.reference for c in results.contrasts.values()}
    for reference in (arm for arm in results.arm_order if arm in references):
        found = {c.arm for c in results.contrasts.values() if c.reference == reference and c.metric in FOREST}
        if found:
            blocks.append((reference, [arm for arm in results.arm_order if arm in found]))
    rows = sum(len(arms) + 1.4 for _, arms in blocks)
    if not rows:
        return None
    with styled():
        figure = Figure(figsize=(WIDTH, 0.235 * rows + 1.2))
        left, right = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(left=0.135, right=0.995, top=1 - 0.57 / figure.get_figheight(), wspace=0.06)
        figure.subplots_adjust(bottom=0.55 / figure.get_figheight())
        ticks, labels, y = [], [], 0.0
        for reference, arms in blocks:
            left.text(
                -0.005, y, f"against {reference}", transform=left.get_yaxis_transform(),
                ha="right", va="center", weight="bold", color=SOFT, size=8,
            )  # fmt: skip
            y += 1
            for arm in arms:
                for axes, metric in zip((left, right), FOREST, strict=True):
                    _interval(
                        axes, y, results.contrasts.get((arm, reference, metric, ALL)), STAND_IN[results.role(arm)]
                    )
                ticks.append(y)
                labels.append(arm)
                y += 1
            y += 0.4
        left.set_yticks(ticks, labels)
        left.set_ylim(y - 0.9, -0.7)
        for axes, name in zip((left, right), FOREST, strict=True):
            entry = METRICS[name]
            axes.axvline(float(entry.is_ratio), color=SOFT, linewidth=1, zorder=0)
            side = "right" if entry.higher_is_better else "left"
            axes.set_title(f"{entry.label.capitalize()} ({side} is better)")
            axes.set_xlabel("ratio to the reference, log scale" if entry.is_ratio else f"difference in {entry.change}")
            if entry.is_ratio:
                axes.set_xscale("log")
                low, high = axes.get_xlim()
                ticks_at = _log_ticks(low, high, (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
                axes.set_xticks(ticks_at, [f"{t:g}" for t in ticks_at])
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.set_xticks([], minor=True)
            axes.grid(axis="x", zorder=-1)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        used = [role for role in ROLES if any(results.role(a) == role for _, arms in blocks for a in arms)]
        handles = [Line2D([], [], color=STAND_IN[role], marker="o", linewidth=3, label=role) for role in used]
        figure.legend(handles=handles, loc="upper right", ncols=len(used), columnspacing=1.6, borderaxespad=0)
        return inline(figure, "Forest plot of every arm's difference from its reference, with intervals")


def _interval(axes: Axes, y: float, contrast: Contrast | None, colour: str) -> None:
    metric = METRICS[contrast.metric] if contrast is not None else PRIMARY
    if contrast is None or not contrast.tested:
        known = contrast is not None and contrast.known
        text = f" {VERDICTS[contrast.verdict]}" if contrast is not None and known else " no result"
        axes.text(float(metric.is_ratio), y, text, va="center", color=SOFT, size=8)
        return
    name, factor = ("ratio", 1.0) if metric.is_ratio else ("difference", metric.factor)
    low, high, low_plain, high_plain = (
        factor * getattr(contrast, f"{name}_{end}") for end in ("low", "high", "low_plain", "high_plain")
    )
    axes.plot([low, high], [y, y], color=colour, linewidth=1.1, solid_capstyle="butt")
    axes.plot([low, high], [y, y], color=colour, linestyle="", marker="|", markersize=6, markeredgewidth=1.1)
    axes.plot([low_plain, high_plain], [y, y], color=colour, linewidth=3.2, solid_capstyle="butt")
    axes.plot(
        [contrast.ratio if metric.is_ratio else factor * contrast.estimate], [y], color=colour, marker="o", markersize=6.5,
        markerfacecolor=PAPER if contrast.verdict == "undecided" else colour, markeredgewidth=1.5,
    )  # fmt: skip


# ---------------------------------------------------------------- learning curves
def learning_curves(results: Results) -> Picture | None:
    """Validation loss against training tokens, mean over seeds with the range; control in every panel."""
    curves = {arm: _curve(results, arm) for arm in results.arm_order if arm in results.histories}
    control = curves.pop(results.control, None)
    panels = _panels(results, list(curves))
    if not panels:
        return None
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = ceil(len(panels) / columns)
    with styled():
        figure = Figure(figsize=(WIDTH, 2.75 * rows + 0.1), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (title, arms) in zip(grid.flat, panels, strict=False):
            axes.set_title(title)
            axes.grid(axis="y", zorder=-1)
            for i, arm in enumerate(arms):
                _draw_curve(axes, curves[arm], arm, SERIES[i], DASHES[i], 1.6)
            if control is not None:
                _draw_curve(axes, control, results.control, INK, "-", 2.2)
                axes.axhline(control["mean"].iloc[-1], color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
            axes.legend(loc="lower left")
            axes.set_yscale("log")
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        _limit_losses(grid[0, 0], [*curves.values(), *([control] if control is not None else [])])
        grid[0, 0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:,.0f}"))
        figure.supxlabel("training tokens (thousands)", size=8.5, color=INK)
        figure.supylabel("validation loss (nats per token, log scale)", size=8.5, color=INK)
        return inline(figure, "Validation loss against training tokens for every arm")


def _curve(results: Results, arm: str) -> pd.DataFrame:
    """Mean, lowest and highest validation loss over the seeds at each step that all of them have."""
    frames = [history.validation for history in results.histories[arm].values() if len(history.validation)]
    joined = (
        pd.concat(frames)
        .groupby("step")
        .agg(
            tokens=("tokens", "mean"),
            mean=("validation_loss", "mean"),
            low=("validation_loss", "min"),
            high=("validation_loss", "max"),
            seeds=("validation_loss", "size"),
        )
    )
    return joined[joined["seeds"] == len(frames)]


def _panels(results: Results, arms: list[str]) -> list[tuple[str, list[str]]]:
    names = {"experiment": "Experiments", "ablation": "Ablations", "baseline": "Baselines", "null": "Nulls"}
    out = []
    for role, title in names.items():
        members = [arm for arm in arms if results.role(arm) == role]
        parts = ceil(len(members) / LINES_PER_PANEL)
        for i in range(parts):
            out.append((title if parts == 1 else f"{title} ({i + 1} of {parts})", members[i::parts] if parts < 1 else
                        members[i * LINES_PER_PANEL : (i + 1) * LINES_PER_PANEL]))  # fmt: skip
    return out


def _draw_curve(axes: Axes, curve: pd.DataFrame, label: str, colour: str, dashes, width: float) -> None:
    axes.fill_between(curve["tokens"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve["tokens"], curve["mean"], color=colour, linestyle=dashes, linewidth=width, label=label)


def _limit_losses(axes: Axes, curves: list[pd.DataFrame]) -> None:
    """Leave out the first fall from chance, which would flatten all that follows."""
    late = [c[c["tokens"] >= 0.1 * c["tokens"].max()] for c in curves]
    low, high = min(c["low"].min() for c in late), max(c["high"].max() for c in late)
    axes.set_ylim(low / 1.06, high * 1.06)
    axes.set_xlim(0, max(c["tokens"].max() for c in curves))
    ticks = _log_ticks(low, high)
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([], minor=True)


def _log_ticks(low: float, high: float, steps: tuple[int | float, ...] = (1, 1.5, 2, 3, 4, 5, 7)) -> list[float]:
    candidates = [m * 10.0**e for e in range(-4, 3) for m in steps]
    inside = [c for c in candidates if low <= c <= high]
    return inside or [float(f"{low:.2g}"), float(f"{high:.2g}")]


# ---------------------------------------------------------------- layers
def layer_similarity(results: Results) -> Picture | None:
    """Debiased CKA of every student layer with every teacher layer; squares mark the layers that arms take."""
    maps = results.layer_maps
    if not maps:
        return None
    panels = [(teacher, document, kind) for teacher, document in maps.items() for kind in ("keys", "values")]
    widest = max(document["src_layers"] for document in maps.values())
    columns = 4 if widest <= 6 and len(panels) > 2 else 2
    cell = float(np.clip((8.4 / columns - 0.3) / widest, 0.13, 0.42))
    rows = ceil(len(panels) / columns)
    # similarities are often far below 1: the colours span what there is, and never less than 0.2
    highest = max(0.2, *(float(np.max(document["similarity"][kind])) for _, document, kind in panels))
    with styled():
        height = rows * (max(document["dst_layers"] for document in maps.values()) * cell + 0.6) + 0.2
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (teacher, document, kind) in zip(grid.flat, panels, strict=False):
            matrix = np.array(document["similarity"][kind])
            image = axes.pcolormesh(matrix, cmap="cividis", vmin=0, vmax=highest, edgecolors="none")
            _mark_layers(results, axes, teacher, document, kind, cell)
            if cell > 0.3:
                _annotate(axes, matrix, highest)
            axes.set_title(f"{teacher}: {kind}")
            axes.set_aspect("equal")
            axes.invert_yaxis()
            every = 1 if cell > 0.22 else 2  # room for two digits
            axes.set_xticks(np.arange(0, matrix.shape[1], every) + 0.5, range(0, matrix.shape[1], every))
            axes.set_yticks(np.arange(0, matrix.shape[0], every) + 0.5, range(0, matrix.shape[0], every))
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("teacher layer", size=8.5, color=INK)
        figure.supylabel("student layer", size=8.5, color=INK)
        bar = figure.colorbar(image, ax=grid, aspect=30, pad=0.02)
        bar.set_label("debiased linear CKA")
        bar.outline.set_visible(False)
        return inline(figure, "Similarity of student and teacher layers, with the chosen layers marked")


def _annotate(axes: Axes, matrix: np.ndarray, highest: float) -> None:
    for (i, j), value in np.ndenumerate(matrix):
        axes.text(j + 0.5, i + 0.5, number(value, 2), ha="center", va="center", size=7.5,
                  color="#000000" if value > 0.55 * highest else "#ffffff")  # fmt: skip


def _mark_layers(results: Results, axes: Axes, teacher: str, document: dict, kind: str, cell: float) -> None:
    """Squares for layers chosen by similarity, a dot in the corner for proportional or listed ones."""
    chosen: dict[str, set[tuple[int, int]]] = {"square": set(), "dot": set()}
    for arm in results.dag.arms.values():
        if teacher not in arm.teachers or "targets" not in arm.needs:
            continue
        sizes = document["src_layers"], document["dst_layers"]
        source = results.manifests.get(results.config.student, {}).get("source", {})
        plan = layer_plan(at_kept_depth(arm.layer, sizes[0], source), *sizes, results.paths.layer_map(teacher))
        side = ("keys", "values").index(kind)
        mark = "square" if arm.layer.kind == "cka" else "dot"
        for layer, (index, beta) in enumerate(zip(plan.index[side].tolist(), plan.beta[side].tolist(), strict=True)):
            chosen[mark] |= {(layer, i) for i, b in zip(index, beta, strict=True) if b > 0}
    # white on black, so that marks stand out on every colour of the map
    unit = cell / 0.42
    for i, j in sorted(chosen["square"]):
        x, y = [j + 0.08, j + 0.92, j + 0.92, j + 0.08, j + 0.08], [i + 0.08, i + 0.08, i + 0.92, i + 0.92, i + 0.08]
        for colour, width in (("#000000", 3.4 * unit + 0.6), ("#ffffff", 1.8 * unit)):
            axes.plot(x, y, color=colour, linewidth=width, solid_joinstyle="miter", solid_capstyle="projecting")
    for i, j in sorted(chosen["dot"]):
        axes.plot([j + 0.8], [i + 0.22], linestyle="", marker="o", markersize=5 * unit, markerfacecolor="#ffffff",
                  markeredgecolor="#000000", markeredgewidth=0.8)  # fmt: skip


# ---------------------------------------------------------------- fusion
def fusion_weights(weights: pd.DataFrame) -> Picture | None:
    """Share of each teacher in the fused target, one bar per arm and task (`tables.fusion_weights`)."""
    if weights.empty:
        return None
    teachers = [c for c in weights.columns if c not in ("arm", "task")]
    arms = list(dict.fromkeys(weights["arm"]))
    with styled():
        figure = Figure(figsize=(WIDTH, 0.24 * len(weights) + 0.2 * len(arms) + 0.75))
        axes = figure.subplots()
        figure.subplots_adjust(left=0.2, right=0.98, top=1 - 0.36 / figure.get_figheight())
        figure.subplots_adjust(bottom=0.42 / figure.get_figheight())
        y, ticks, labels = 0.0, [], []
        for arm in arms:
            for _, row in weights[weights["arm"] == arm].iterrows():
                start = 0.0
                for i, teacher in enumerate(teachers):
                    share = row[teacher]
                    if not np.isfinite(share):
                        continue
                    axes.barh(y, share, left=start, height=0.78, color=SERIES[i % 6], alpha=0.85, edgecolor=PAPER)
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
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(teachers), borderaxespad=0.2)
        return inline(figure, "Mean fusion weight of each teacher per arm and task")


# ---------------------------------------------------------------- fit
def explained_variance(results: Results) -> Picture | None:
    """Share of the teacher's variance that the projected target keeps, and the cosine of the student's attention outputs
    when the target takes the place of its own cache, per student layer, one panel per fit."""
    fits = {f: d for f, d in results.fits.items() if any(_finite(v) for v in d["explained_variance"].values())}
    if not fits:
        return None
    columns = min(4, len(fits))
    rows = ceil(len(fits) / columns)
    everything = [
        x for d in fits.values() for kinds in d["explained_variance"].values() for v in kinds.values() for x in v
    ]
    everything += [x for d in fits.values() for v in d.get("attention_output_cosine", {}).values() for x in v]
    lowest = float(np.nanmin(np.array(everything, dtype=float)))
    shown = [t for t in results.dag.teachers if any(t in d["explained_variance"] for d in fits.values())]
    colours = {teacher: SERIES[i % 6] for i, teacher in enumerate(shown)}
    kinds: dict[str, dict[str, Any]] = {
        "keys": {"linestyle": DASHES[1], "marker": "o"},
        "values": {"linestyle": "-", "marker": "s"},
        "attention output": {"linestyle": ":", "marker": "^"},
    }
    with styled():
        figure = Figure(figsize=(WIDTH, 1.75 * rows + 0.55), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, (fit_id, document) in zip(grid.flat, fits.items(), strict=False):
            users = [name for name, arm in results.dag.arms.items() if _uses(results, arm, fit_id)]
            axes.set_title(textwrap.fill(", ".join(users), 30), size=8.5)
            for teacher, found in document["explained_variance"].items():
                cosine = document.get("attention_output_cosine", {}).get(teacher)
                for kind, style in kinds.items():
                    if kind not in found and cosine is None:
                        continue
                    values = np.array(found.get(kind, cosine), dtype=float)
                    axes.plot(range(len(values)), values, color=colours[teacher], markersize=4, clip_on=False, **style)
            axes.set_xticks(range(len(values)))
            axes.grid(axis="y", zorder=-1)
        grid[0, 0].set_ylim(np.floor(10 * min(lowest, 0.9)) / 10, 1)
        for axes in grid.flat[len(fits) :]:
            axes.set_visible(False)
        handles = [Line2D([], [], color=colour, linewidth=5, label=teacher) for teacher, colour in colours.items()]
        handles += [Line2D([], [], color=INK, markersize=4, label=kind, **style) for kind, style in kinds.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.6)
        figure.supxlabel("student layer", size=8.5, color=INK)
        figure.supylabel("explained variance, cosine", size=8.5, color=INK)
        return inline(
            figure, f"Explained variance and attention-output cosine per layer of the fits {listed(list(fits))}"
        )


def _uses(results: Results, arm, fit_id: str) -> bool:
    return results.dag.needs_fit(arm) and results.dag.fit_id(arm) == fit_id


def _finite(kinds: dict[str, list[float]]) -> bool:
    return bool(np.isfinite(np.array([*kinds["keys"], *kinds["values"]], dtype=float)).any())
