"""The metrics, one entry each: measures, tables, statistics, the report and the cards read them here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Scale = Literal["log", "logged", "arcsine", "none"]


@dataclass(frozen=True)
class Metric:
    """One metric: how it is measured, compared and shown."""

    name: str
    """In tables."""
    label: str
    """In words."""
    unit: str
    """Of the number that is shown; empty where the label says it."""
    change: str
    """Of a difference that is shown."""
    per: Literal["item", "curve", "cost"]
    """`item`: measured on the items of a cell and a task; the others are one number of a cell: of its validation curve and
    control's, or of what `cost.json` holds."""
    measure: Callable[..., Any]
    """`item`: table of one cell's items of one task → a value for each, whose mean is the metric. `curve`: the cell's and
    control's curve → a number, NaN where there is none. `cost`: `cost.json` → a number."""
    scale: Scale = "none"
    """What is compared: logarithms (`log`; a metric that is one itself is `logged`), arcsines of the root (`arcsine`), or
    the metric as it is. Differences of logarithms are shown as ratios."""
    higher_is_better: bool = False
    factor: float = 1.0
    """What is shown is so many times the metric; of a `logged` one, e to its power."""
    digits: int = 3
    main: bool = False
    """Of reasoning and answer: among the conclusions, in the table per task and on cards."""
    column: str = ""
    """Of the items, where not all have it: the metric is measured where every cell does."""
    tested: bool = True
    """False where failures have no number: they would leave the comparison."""

    @property
    def title(self) -> str:
        """The label with its unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def largest(self) -> float:
        """The largest value, and so the largest difference, that there can be."""
        return 1.0 if self.scale == "arcsine" else inf

    @property
    def is_ratio(self) -> bool:
        """Whether a difference on the scale of the comparison is a ratio of what is shown."""
        return self.scale in ("log", "logged")

    def shown(self, value: float) -> float:
        """A value in the unit that people read."""
        return exp(value) if self.scale == "logged" else self.factor * value

    def transform(self, value: ArrayLike) -> NDArray[np.float64]:
        """Values on the scale of the comparison."""
        value = np.asarray(value, dtype=np.float64)
        match self.scale:
            case "log":
                return np.log(value, out=np.full(value.shape, np.nan), where=value > 0)
            case "arcsine":
                return np.arcsin(np.sqrt(value))
        return value

    def back(self, value: ArrayLike) -> NDArray[np.float64]:
        """The metric of values on the scale of the comparison; NaN beyond what there can be."""
        value = np.asarray(value, dtype=np.float64)
        match self.scale:
            case "log":
                return np.exp(value)
            case "arcsine":
                return np.where((value >= 0) & (value <= np.pi / 2), np.sin(value) ** 2, np.nan)
        return value

    def slope(self, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """d metric / d scale at means: what a step on the scale of the comparison is worth there."""
        match self.scale:
            case "log":
                return mean
            case "arcsine":
                return 2 * np.sqrt(mean * (1 - mean))
        return np.ones_like(mean)


# ---------------------------------------------------------------- measures
def _ratio(numerator: pd.Series, denominator: pd.Series) -> pd.Series:
    """Values of items whose mean is the ratio of sums, not the mean of ratios.

    Linear in the item (the influence function), so that their spread is that of the ratio: an item counts for what its
    numerator departs from the ratio's share of its denominator.
    """
    ratio = numerator.sum() / denominator.sum()
    return ratio + (numerator - ratio * denominator) / denominator.mean()


def tokens_to(curve: pd.DataFrame, target: float) -> float:
    """Training tokens at which a validation curve first reaches a loss, between evaluations by linear interpolation.

    NaN when it never does.
    """
    loss, tokens = curve.validation_loss.to_numpy(), curve.tokens.to_numpy(float)
    below = np.flatnonzero(loss <= target)
    if not below.size:
        return float("nan")
    i = int(below[0])
    if i == 0:
        return float(tokens[0])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def area_under(curve: pd.DataFrame) -> float:
    """Mean validation loss over the training tokens (trapezoids): lower is faster."""
    tokens = curve.tokens.to_numpy(float)
    return float(np.trapezoid(curve.validation_loss, tokens) / (tokens[-1] - tokens[0]))


# ---------------------------------------------------------------- the table
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "bits_per_byte", "bits per byte", "", "bits per byte", "item",
            lambda d: _ratio(d.nll / np.log(2), d.bytes), "log", main=True,
        ),
        Metric(
            "bits_per_byte_all_text", "bits per byte, all text", "", "bits per byte", "item",
            lambda d: _ratio(d.nll_all / np.log(2), d.bytes_all), "log",
        ),
        Metric(
            "log_perplexity", "perplexity", "per token", "", "item",
            lambda d: _ratio(d.nll, d.tokens), "logged", main=True,
        ),
        Metric(
            "log_perplexity_all_text", "perplexity, all text", "per token", "", "item",
            lambda d: _ratio(d.nll_all, d.tokens_all), "logged",
        ),
        Metric(
            "accuracy", "accuracy", "%", "points", "item",
            lambda d: d.correct.astype(float), "arcsine", higher_is_better=True, factor=100.0, digits=1, main=True,
        ),
        Metric(
            "cache_swap", "bits per byte from the teacher's cache", "", "bits per byte", "item",
            lambda d: _ratio(d.nll_swap / np.log(2), d.bytes), "log", column="nll_swap",
        ),
        Metric(
            "cache_swap_ridge", "bits per byte from the teacher's cache, ridge after training", "", "bits per byte", "item",
            lambda d: _ratio(d.nll_swap_ridge / np.log(2), d.bytes), "log", column="nll_swap_ridge",
        ),
        Metric(
            "no_prompt", "bits per byte without the prompt", "", "bits per byte", "item",
            lambda d: _ratio(d.nll_no_prompt / np.log(2), d.bytes), "log", column="nll_no_prompt",
        ),
        *(
            metric
            for kind in ("int8", "int4")
            for metric in (
                Metric(
                    f"bits_per_byte_{kind}", f"bits per byte, {kind} weights (dequantized)", "", "bits per byte", "item",
                    lambda d, kind=kind: _ratio(d[f"nll_{kind}"] / np.log(2), d.bytes), "log", column=f"nll_{kind}",
                ),
                Metric(
                    f"loss_{kind}", f"bits per byte that {kind} weights cost", "", "bits per byte", "item",
                    lambda d, kind=kind: _ratio((d[f"nll_{kind}"] - d.nll) / np.log(2), d.bytes), digits=4,
                    column=f"nll_{kind}",
                ),
                Metric(
                    f"model_bytes_{kind}", f"size with {kind} weights", "MB", "MB", "item",
                    lambda d, kind=kind: d[f"model_bytes_{kind}"].astype(float), factor=1e-6, column=f"model_bytes_{kind}",
                    tested=False,
                ),
            )
        ),
        Metric(
            "model_bytes", "size", "MB", "MB", "item", lambda d: d.model_bytes.astype(float), factor=1e-6,
            column="model_bytes", tested=False,
        ),
        Metric(
            "tokens_to_control", "convergence", "thousand tokens", "thousand tokens", "curve",
            lambda own, control: tokens_to(own, control.validation_loss.iloc[-1]), factor=1e-3, digits=0, tested=False,
        ),
        Metric(
            "validation_area", "validation area", "nats per token", "nats per token", "curve",
            lambda own, control: area_under(own), "log",
        ),
        Metric(
            "train_seconds", "training time", "s", "s", "cost", lambda cost: cost.get("train_seconds", np.nan), "log", digits=1,
        ),
        Metric(
            "peak_memory_bytes", "peak memory", "MB", "MB", "cost", lambda cost: cost.get("peak_memory_bytes", np.nan), "log",
            factor=1e-6, digits=0,
        ),
    )
}  # fmt: skip
"""Name → metric, in the order of the report's columns."""
ITEM_METRICS = {name: metric for name, metric in METRICS.items() if metric.per == "item"}
"""Those that are measured on items."""


def register(metric: Metric) -> Metric:
    """Enter a metric of an extension: tables, statistics, the report and the cards follow.

    Raises:
        ValueError: its name is taken.
    """
    if metric.name in METRICS and METRICS[metric.name].measure.__module__ != metric.measure.__module__:
        raise ValueError(f"metric {metric.name!r} is taken: rename yours")
    METRICS[metric.name] = metric
    if metric.per == "item":
        ITEM_METRICS[metric.name] = metric
    return metric


PRIMARY = METRICS["bits_per_byte"]
"""What verdicts on the first screen are about."""
