"""Numbers as text, and the report's conclusions as sentences that follow from the tables by fixed rules."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite

from kvpipe.report.collect import Contrast, Results
from kvpipe.stats.metrics import METRICS, PRIMARY
from kvpipe.stats.scores import ALL

DASH = "–"
VERDICTS = {
    **{verdict: verdict for verdict in ("better", "worse", "undecided", "missing")},
    "untested": "not tested",
    "constant": "not tested: seeds do not vary",
}
TONES = {"better": "good", "worse": "bad"}


@dataclass(frozen=True)
class Statement:
    """One conclusion; `tone` is good, bad, neutral or missing."""

    tone: str
    lead: str
    text: str


# ---------------------------------------------------------------- numbers
def number(value: float, digits: int = 3) -> str:
    """Fixed digits, a real minus sign, a dash for NaN."""
    if not isfinite(value):
        return {float("inf"): "∞", float("-inf"): "−∞"}.get(value, DASH)
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """`number` with its sign always."""
    return ("+" if isfinite(value) and value >= 0 else "") + number(value, digits)


def p_value(value: float) -> str:
    """Four digits, `<0.0001` below."""
    if not isfinite(value):
        return DASH
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def shown(metric: str, value: float) -> str:
    """A metric's value in the report's unit."""
    entry = METRICS[metric]
    return number(entry.shown(value), entry.digits)


def level(results: Results) -> str:
    """The confidence that was asked for, as it is written: `95%`."""
    return f"{100 * results.config.stats.confidence:g}%"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ---------------------------------------------------------------- conclusions
def ratio(c: Contrast, end: str = "") -> str:
    """The ratio with its interval, corrected or (`_plain`) alone; a dash for metrics that are no ratio."""
    if not c.tested or not isfinite(c.ratio):
        return number(c.ratio, 2)
    low, high = (number(getattr(c, f"ratio_{side}{end}"), 2) for side in ("low", "high"))
    return f"{number(c.ratio, 2)} ({low} to {high})"


def change(c: Contrast) -> str:
    """The difference with its interval, in the metric's unit; of perplexity, which is compared as a ratio, a dash."""
    metric = METRICS[c.metric]
    if metric.scale == "logged":
        return DASH
    estimate, low, high = (
        signed(metric.factor * x, metric.digits) for x in (c.estimate, c.difference_low, c.difference_high)
    )
    return f"{estimate} ({low} to {high})" if c.tested else estimate


def detectable(c: Contrast) -> str:
    """The smallest improvement that the design finds with the configured probability."""
    metric = METRICS[c.metric]
    if metric.is_ratio:
        return f"× {number(c.mde_ratio, 2)}" if isfinite(c.mde_ratio) else DASH
    return number(metric.factor * c.mde, metric.digits)


def difference(c: Contrast, interval: str = "") -> str:
    """The contrast by the primary method: ratio, difference in the metric's unit, p corrected for its family."""
    metric = METRICS[c.metric]
    unit = f" {metric.change}" if metric.change else ""
    if not c.tested:
        seeds = f"{c.n_seeds} seed{'s' if c.n_seeds != 1 else ''}"
        why = "seeds do not vary" if c.verdict == "constant" else seeds
        plain = f"{number(exp(c.estimate), 2)} × {c.reference}’s" if metric.scale == "logged" else f"{change(c)}{unit}"
        return f"{plain} ({why}, not tested)"
    of = f"{number(c.ratio, 2)} × {c.reference}’s ({interval}{number(c.ratio_low, 2)} to {number(c.ratio_high, 2)})"
    parts = ([of] if metric.is_ratio else []) + ([f"{change(c)}{unit}"] if metric.scale != "logged" else [])
    return f"{', '.join(parts)}, p {p_value(c.p_dunnett)}"


def question(results: Results) -> str:
    """What the experiment asks."""
    control, label = results.control, {name: arm.label for name, arm in results.dag.arms.items()}

    def said(name: str) -> str:
        return f"{name} ({label[name]})" if label[name] else name

    side = "more" if PRIMARY.higher_is_better else "fewer"
    own = said(results.headline) if results.headline else "an arm"
    where = f"unseen items of {listed(results.tasks)}"
    return f"Does {own} need {side} {PRIMARY.label} than {said(control)} on {where}?"


def answer(results: Results) -> Statement:
    """The answer in one sentence, with its interval."""
    return _headline(results)[0]


def cost(results: Results) -> str:
    """What the answer has cost."""
    spent, cells = results.spending, results.costs
    if not cells:
        return "No cell has said what it cost."
    gpu = spent.gpu_hours.sum()
    gpus = f", {number(gpu, 2)} GPU hours" if gpu else ", no GPU"
    own = [c["train_seconds"] for (arm, _), c in cells.items() if arm == results.headline]
    control = [c["train_seconds"] for (arm, _), c in cells.items() if arm == results.control]
    each = ""
    if own and control:
        means = [number(sum(found) / len(found), 1) for found in (own, control)]
        each = f" A cell of {results.headline} trains {means[0]} s, one of {results.control} {means[1]} s."
    peak = max(c["peak_memory_bytes"] for c in cells.values()) / 1e9
    return f"{len(cells)} cells: {number(spent.hours.sum(), 2)} hours in all{gpus}; peak memory {number(peak, 2)} GB.{each}"


def conclusions(results: Results) -> list[Statement]:
    """What else the tables say, most important first. Every word follows from the primary method's verdicts."""
    return [
        *_fairness(results),
        *_headline(results)[1:],
        *_nulls(results),
        *_components(results),
        *_baselines(results),
        *_speed(results),
    ]


def _fairness(results: Results) -> list[Statement]:
    checks = results.audit["checks"] if results.audit else []
    found = sorted({check["name"] for check in checks if check["status"] != "ok"})
    if not found:
        return []
    text = (
        f"The audit found a breach of {listed(found)}; the details are below. Read every comparison with that in mind."
    )
    return [Statement("bad", "The comparison is not fair.", text)]


def _headline(results: Results) -> list[Statement]:
    arm, control = results.headline, results.control
    if arm is None:
        text = f"The contrasts below compare each arm with {control}."
        return [Statement("neutral", "There is no experiment to conclude on.", text)]
    contrasts = {name: results.contrasts.get((arm, control, name, ALL)) for name, m in METRICS.items() if m.main}
    main = contrasts.pop(PRIMARY.name)
    if main is None or not main.known:
        text = "The contrast has no estimate in the statistics."
        return [Statement("missing", f"{arm} against {control}: no result.", text)]
    lead = {
        "better": f"{arm} beats {control}.",
        "worse": f"{arm} is worse than {control}.",
        "undecided": f"{arm} is not shown to beat {control}.",
    }.get(main.verdict, f"{arm} against {control} is not tested.")
    text = f"{_both(results, PRIMARY.name)} {PRIMARY.label}: {difference(main, f'{level(results)} interval ')}."
    if main.verdict == "undecided":
        chance = f"with {100 * results.config.stats.power:g}% probability"
        text += f" The interval includes 1; a true ratio of {number(main.mde_ratio, 2)} would be found {chance}."
    out = [Statement(TONES.get(main.verdict, "neutral"), lead, text)]
    for name, c in contrasts.items():
        words = METRICS[name].label.capitalize()
        if c is None or not c.known:
            out.append(Statement("missing", f"{words}: no result.", "The contrast has no estimate in the statistics."))
            continue
        word = {"better": "is better", "worse": "is worse", "undecided": "is not shown to differ"}.get(
            c.verdict, "is not tested"
        )
        out.append(
            Statement(TONES.get(c.verdict, "neutral"), f"{words} {word}.", f"{_both(results, name)}: {difference(c)}.")
        )
    return out


def _both(results: Results, metric: str) -> str:
    means = [results.arms[arm or "", metric, ALL].mean for arm in (results.headline, results.control)]
    return " against ".join(shown(metric, mean) + "%" * (METRICS[metric].unit == "%") for mean in means)


def _nulls(results: Results) -> list[Statement]:
    """Each null against control, by the plain interval of the ratio and the margin that was set before the run."""
    out = []
    bound = 1 + results.config.stats.margin
    margin = f"margin {number(1 / bound, 2)} to {number(bound, 2)}"
    for name in (n for n in results.arm_order if results.role(n) == "null"):
        c = results.contrasts.get((name, results.control, PRIMARY.name, ALL))
        if c is None or not c.known:
            out.append(Statement("missing", f"{name}: no result.", "Whether this null stays null is not known."))
            continue
        if not c.tested:
            text = f"{difference(c)}. Whether this null stays null is not known."
            out.append(Statement("missing", f"{name} is not tested:", text))
            continue
        low, high = c.ratio_low_plain, c.ratio_high_plain
        # control again under other seeds: a difference either way would be a false positive
        must_be_equal = not results.dag.arms[name].teachers
        helps, harms = high < 1, low > 1
        null = low > 1 / bound and (high < bound or not must_be_equal)
        if null:
            tone, lead = "good", f"{name} {f'is equal to {results.control}' if must_be_equal else 'shows no benefit'}:"
            what = "within the margin" if high < bound else "no better than the margin allows"
        elif helps or (harms and must_be_equal):
            tone, lead = "bad", f"{name} is not null:"
            what = f"{'better' if helps else 'worse'} than {results.control}"
        else:
            tone, lead = "neutral", f"{name} is undecided:"
            what = "an interval that holds 1 and reaches beyond the margin"
        text = f"{ratio(c, '_plain')} × {results.control}’s bits per byte, {what} ({level(results)} interval, not corrected; "
        out.append(Statement(tone, lead, f"{text}{margin})."))
    return out


def _components(results: Results) -> list[Statement]:
    """What experiments and ablations change in the arm that they are built on, one sentence for each role and base."""
    groups: dict[tuple[str, str], list[Contrast]] = {}
    for c in results.contrasts.values():
        known = c.arm in results.dag.arms and c.reference in results.dag.arms
        if known and (c.metric, c.task) == (PRIMARY.name, ALL) and results.role(c.reference) == "experiment":
            groups.setdefault((results.role(c.arm), c.reference), []).append(c)
    out = []
    for (role, reference), found in groups.items():
        parts = []
        for verdict, words in (
            ("better", "better than"),
            ("worse", "worse than"),
            ("undecided", "not shown to differ from"),
            ("untested", "not tested against"),
            ("constant", "not tested, as seeds do not vary, against"),
        ):
            names = [f"{c.arm} {_short(c)}" for c in found if c.verdict == verdict]
            if names:
                parts.append(f"{words} {reference}: {listed(names)}")
        missing = [c.arm for c in found if c.verdict == "missing"]
        if missing:
            parts.append(f"without result: {listed(missing)}")
        what = "component" if role == "experiment" else role
        lead = f"What each {what} adds to {reference} ({PRIMARY.label}, ratio with its corrected interval):"
        out.append(Statement("neutral", lead, "; ".join(parts) + "."))
    return out


def _short(c: Contrast) -> str:
    return f"× {ratio(c)}" if c.tested else signed(c.estimate)


def _baselines(results: Results) -> list[Statement]:
    headline = results.headline
    own_name = headline or ""
    own = results.arms.get((own_name, PRIMARY.name, ALL))
    names = [n for n in results.arm_order if results.role(n) == "baseline" and n != headline]
    if own is None or not own.known or not names:
        return []
    parts: list[str] = []
    tones: list[str] = []
    for name in names:
        direct = results.contrasts.get((own_name, name, PRIMARY.name, ALL))
        other = results.arms.get((name, PRIMARY.name, ALL))
        tones += [] if direct is None else [direct.verdict]
        if direct is not None and direct.known:
            parts.append(f"{name}: {VERDICTS[direct.verdict]}, {difference(direct)}")
        elif other is not None and other.known:
            parts.append(f"{name} {number(other.mean, 3)}")
        else:
            parts.append(f"{name} {DASH}")
    tone = "good" if set(tones) == {"better"} else "bad" if "worse" in tones else "neutral"
    note = "" if tones else f" (means only: no contrast between {headline} and a baseline was computed)"
    lead = f"{headline} ({number(own.mean, 3)} bits per byte) against the baselines:"
    return [Statement(tone, lead, "; ".join(parts) + note + ".")]


def _speed(results: Results) -> list[Statement]:
    arm, reference = results.headline, results.control
    own, control = (results.arms.get((name, "tokens_to_control", "all")) for name in (arm or "", reference))
    if own is None or control is None or not control.known:
        return []
    seeds = len(results.config.seeds)
    if control.mean == 0:
        return [Statement("neutral", "Convergence:", f"{reference} ends no better than it began.")]
    if not own.known or own.n_seeds < seeds:
        count = f"{arm} reached {reference}’s final validation loss in {own.n_seeds} of {seeds} seeds."
        return [Statement("neutral", "Convergence:", count)]
    share = f"{100 * own.mean / control.mean:.0f}%"
    tokens = f"{own.mean / 1000:,.0f} thousand training tokens"
    text = f"{arm} reaches {reference}’s final validation loss after {tokens}, {share} of what {reference} needs."
    return [Statement("neutral", "Convergence:", f"{text} This is not tested.")]
