"""Numbers as text, and the report's conclusions as sentences that follow from the tables by fixed rules."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite

from kvpipe.report.collect import HIGHER_IS_BETTER, Contrast, Results

DASH = "–"
METRIC_NAMES = {
    "bits_per_byte": "bits per byte",
    "log_perplexity": "perplexity",
    "accuracy": "accuracy",
    "tokens_to_control": "convergence",
    "validation_area": "validation area",
    "train_seconds": "training time",
    "peak_memory_bytes": "peak memory",
    "bits_per_byte_all_text": "bits per byte, all text",
    "log_perplexity_all_text": "perplexity, all text",
}
VERDICTS = {verdict: verdict for verdict in ("better", "worse", "undecided", "missing")} | {"untested": "not tested"}


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


def scaled(metric: str, value: float) -> tuple[float, int]:
    """A metric in the unit that the report shows, and its digits."""
    match metric:
        case "log_perplexity" | "log_perplexity_all_text":
            return exp(value), 3
        case "accuracy":
            return 100 * value, 1
        case "train_seconds":
            return value, 1
        case "tokens_to_control":
            return value / 1000, 0
        case "peak_memory_bytes":
            return value / 1e6, 0
        case _:
            return value, 3


def shown(metric: str, value: float) -> str:
    """A metric's value in the report's unit."""
    return number(*scaled(metric, value))


def level(results: Results) -> str:
    """The confidence that was asked for, as it is written: `95%`."""
    return f"{100 * results.config.stats.confidence:g}%"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ---------------------------------------------------------------- conclusions
def difference(c: Contrast) -> str:
    """The estimate with its corrected interval and Holm p, in the metric's unit."""
    seeds = f"{c.n_seeds} seed{'s' if c.n_seeds != 1 else ''}"
    if c.metric == "log_perplexity":
        ratio, low, high = (number(exp(x), 3) for x in (c.estimate, c.low_corrected, c.high_corrected))
        percent = f"{abs(100 * (exp(c.estimate) - 1)):.1f}% {'lower' if c.estimate < 0 else 'higher'}"
        change, interval = f"{ratio} × {c.reference}’s, {percent}", f"corrected interval {low} × to {high} ×"
    else:
        unit, factor, digits = {
            "accuracy": (" points", 100, 1),
            "bits_per_byte": (" bits per byte", 1, 3),
        }.get(c.metric, ("", 1, 3))
        estimate, low, high = (signed(factor * x, digits) for x in (c.estimate, c.low_corrected, c.high_corrected))
        change, interval = f"{estimate}{unit}", f"corrected interval {low} to {high}"
    return f"{change} ({interval}, Holm p {p_value(c.p_holm)})" if c.tested else f"{change} ({seeds}, not tested)"


def conclusions(results: Results) -> list[Statement]:
    """What the tables say, most important first. Every word follows from a corrected interval."""
    return [
        *_fairness(results),
        *_headline(results),
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
    contrasts = {m: results.contrasts.get((arm, control, m, "all")) for m in METRIC_NAMES}
    main = contrasts["bits_per_byte"]
    if main is None or not main.known:
        text = "The contrast has no estimate in the statistics."
        return [Statement("missing", f"{arm} against {control}: no result.", text)]
    lead = {
        "better": f"{arm} beats {control}.",
        "worse": f"{arm} is worse than {control}.",
        "undecided": f"{arm} is not shown to beat {control}.",
        "untested": f"{arm} against {control} is not tested.",
    }[main.verdict]
    text = f"{_both(results, 'bits_per_byte')} bits per byte: {difference(main)}."
    if main.verdict == "undecided":
        chance = f"with {100 * results.config.stats.power:g}% probability"
        text += (
            f" The corrected interval includes 0; a true difference of {number(main.mde, 3)} would be found {chance}."
        )
    out = [Statement({"better": "good", "worse": "bad"}.get(main.verdict, "neutral"), lead, text)]
    for metric, words in (("log_perplexity", "Perplexity"), ("accuracy", "Accuracy")):
        c = contrasts[metric]
        if c is None or not c.known:
            out.append(Statement("missing", f"{words}: no result.", "The contrast has no estimate in the statistics."))
            continue
        tone = {"better": "good", "worse": "bad"}.get(c.verdict, "neutral")
        word = {"better": "is better", "worse": "is worse", "undecided": "is not shown to differ"}.get(
            c.verdict, "is not tested"
        )
        out.append(Statement(tone, f"{words} {word}.", f"{_both(results, metric)}: {difference(c)}."))
    return out


def _both(results: Results, metric: str) -> str:
    means = [results.arms[arm or "", metric, "all"].mean for arm in (results.headline, results.control)]
    return " against ".join(shown(metric, mean) + ("%" if metric == "accuracy" else "") for mean in means)


def _nulls(results: Results) -> list[Statement]:
    out = []
    for name in (n for n in results.arm_order if results.role(n) == "null"):
        c = results.contrasts.get((name, results.control, "bits_per_byte", "all"))
        if c is None or not c.known:
            out.append(Statement("missing", f"{name}: no result.", "Whether this null stays null is not known."))
            continue
        if not c.tested:
            text = f"{difference(c)}. Whether this null stays null is not known."
            out.append(Statement("missing", f"{name} is not tested:", text))
            continue
        # Judged by the plain interval: one widened for a family of claims would make it easier to pass as null.
        below, above = c.high < 0, c.low > 0
        better, worse = (above, below) if c.metric in HIGHER_IS_BETTER else (below, above)
        # control again under other seeds: a difference either way would be a false positive
        must_be_equal = not results.dag.arms[name].teachers
        holds = not better and not (worse and must_be_equal)
        what = "is better than" if better else "is worse than" if worse else "is not shown to differ from"
        plain = f"{level(results)} interval {signed(c.low, 3)} to {signed(c.high, 3)}, not corrected"
        # worse than control is a finding; an interval that includes 0 is none
        tone = "bad" if not holds else "good" if worse else "neutral"
        lead = f"{name} {'shows no benefit' if holds else 'is not null'}:"
        text = f"it {what} {results.control}, {signed(c.estimate, 3)} bits per byte ({plain})."
        out.append(Statement(tone, lead, text))
    return out


def _components(results: Results) -> list[Statement]:
    """What experiments and ablations change in the arm that they are built on, one sentence for each role and base."""
    groups: dict[tuple[str, str], list[Contrast]] = {}
    for c in results.contrasts.values():
        known = c.arm in results.dag.arms and c.reference in results.dag.arms
        if known and (c.metric, c.task) == ("bits_per_byte", "all") and results.role(c.reference) == "experiment":
            groups.setdefault((results.role(c.arm), c.reference), []).append(c)
    out = []
    for (role, reference), found in groups.items():
        parts = []
        for verdict, words in (
            ("better", "better than"),
            ("worse", "worse than"),
            ("undecided", "not shown to differ from"),
            ("untested", "not tested against"),
        ):
            names = [f"{c.arm} ({signed(c.estimate)})" for c in found if c.verdict == verdict]
            if names:
                parts.append(f"{words} {reference}: {listed(names)}")
        missing = [c.arm for c in found if c.verdict == "missing"]
        if missing:
            parts.append(f"without result: {listed(missing)}")
        lead = f"What each {'component' if role == 'experiment' else role} adds to {reference} (bits per byte):"
        out.append(Statement("neutral", lead, "; ".join(parts) + "."))
    return out


def _baselines(results: Results) -> list[Statement]:
    headline = results.headline
    own_name = headline or ""
    own = results.arms.get((own_name, "bits_per_byte", "all"))
    names = [n for n in results.arm_order if results.role(n) == "baseline" and n != headline]
    if own is None or not own.known or not names:
        return []
    parts: list[str] = []
    tones: list[str] = []
    for name in names:
        direct = results.contrasts.get((own_name, name, "bits_per_byte", "all"))
        other = results.arms.get((name, "bits_per_byte", "all"))
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
    if not own.known or own.n_seeds < seeds:
        count = f"{arm} reached {reference}’s final validation loss in {own.n_seeds} of {seeds} seeds."
        return [Statement("neutral", "Convergence:", count)]
    share = f"{100 * own.mean / control.mean:.0f}%"
    tokens = f"{own.mean / 1000:,.0f} thousand training tokens"
    text = f"{arm} reaches {reference}’s final validation loss after {tokens}, {share} of what {reference} needs."
    return [Statement("neutral", "Convergence:", f"{text} This is not tested.")]
