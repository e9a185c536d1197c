"""The report's tables, every missing number with its reason."""

from __future__ import annotations

from math import isfinite, log
from typing import Any

import numpy as np

from kvpipe.config import LOSS_ON, Arm
from kvpipe.experiment.paths import SPLITS, TABLES
from kvpipe.report.collect import ON_DEVICE, THIRDS, Results, read_document
from kvpipe.report.readings import ReadExample
from kvpipe.report.table import Cell, Column, Table
from kvpipe.report.wording import DASH, VERDICTS, change, detectable, level, number, p_value, ratio, shown, signed
from kvpipe.stats.metrics import METRICS, PRIMARY, tokens_to
from kvpipe.stats.scores import ALL, UNTRAINED

ROLE_TEXTS = {
    "control": "trained on the text alone; everything is compared with it",
    "experiment": "learns from teachers too; one that is built on another shows what its own components add",
    "ablation": "another arm with some settings changed",
    "baseline": "what one would use instead of this method; a method worth using beats it",
    "null": "contains no usable teacher knowledge; if it beat control, the benefit would not come from the teacher",
}
READ = {"student": "the records’ text", "own": "its own longer reasoning", "written": "what it has written"}


def _words(*labels: str) -> list[Column]:
    return [Column(label, number=False) for label in labels]


# ---------------------------------------------------------------- what was run
def arms(results: Results) -> Table:
    """Each arm's components; those that differ from the arm it is based on are marked."""
    heads = ("from", "teachers", "time", "layers", "projector", "fit", "fusion", "loss")
    table = Table("Every arm by role; settings that differ from the arm's base are marked.", "arm", _words(*heads))
    for name in results.arm_order:
        arm, base = results.dag.arms[name], results.config.arms[name].base
        before = components(results.dag.arms[base]) if base else {}
        parts = [Cell(t, css="changed" if base and t != before.get(k) else "") for k, t in components(arm).items()]
        table.arm(results, name, base or "", *parts, group=f"{arm.role}: {ROLE_TEXTS[arm.role]}")
    return table


def components(arm: Arm) -> dict[str, str]:
    """An arm's settings in words; a dash where the component plays no part in it."""
    text = "" if arm.reading == "student" else f", {arm.student_reasoning} reasoning"
    out = dict.fromkeys(("teachers", "time", "layer", "projector", "fit", "fusion"), DASH) | {"loss": "CE" + text}
    if not arm.teachers:
        return out
    out["teachers"] = ", ".join(arm.teachers) + (" (shuffled)" if arm.shuffle_teacher else "")
    read = frozenset().union(*(term.reads for term in arm.loss.values()))
    if len(arm.teachers) > 1 and "fuse" in read:
        rows = getattr(arm.fuse, "weights", {})
        table = rows if isinstance(rows, dict) else {"": rows}
        out["fusion"] = arm.fuse.kind + "".join(f" {t} {'/'.join(f'{w:g}' for w in row)}" for t, row in table.items())
    out["time"] = "same byte end"
    if "time" in read:
        mode = f" ({arm.time.mode})" if arm.time.kind != "position" else ""
        own = {"own": ", own text", "written": ", own text as written"}.get(arm.time.text, "")
        out["time"] = arm.time.kind + mode + own
        out["time"] += ", inside segments" if arm.time.borders == "keep" else ""
    if "layer" in read:
        layer = arm.layer
        out["layer"] = f"CKA top-{layer.k}, {layer.combine}" if layer.kind == "cka" else layer.kind
        out["projector"] = f"{arm.projector.kind}, {arm.projector.mode}"
        out["fit"] = arm.fit.method
    short = {"cross_entropy": "CE"}
    terms = [(short.get(name, name.replace("_", " ")), term.weight) for name, term in arm.terms.items()]
    parts = [name if weight == 1 and name == "CE" else f"{weight:g} {name}" for name, weight in terms if weight]
    return out | {"loss": " + ".join(parts) + text}


def data(results: Results) -> Table:
    """The data card: where each task's records come from, how many there are, what was left out, who judges answers."""
    table = Table(
        "Data: source and records of every task.", "task",
        [*_words("source", "judged by"), *(Column(split, "records") for split in SPLITS), Column("prompt", "mean bytes"),
         Column("reasoning", "mean bytes"), Column("answer", "mean bytes")],
    )  # fmt: skip
    records = {split: results.records(split) for split in SPLITS}
    for source in results.config.data.sources:
        own = {split: [r for r in found if r.task == source.task] for split, found in records.items()}
        texts = [[len(getattr(r, part).encode()) for r in own["train"]] for part in ("prompt", "reasoning", "answer")]
        said = source.model_dump(exclude={"kind", "task", *SPLITS}, exclude_defaults=True)
        words = ", ".join([source.kind, *(f"{k} {v}" for k, v in said.items() if isinstance(v, str | int | float))])
        judges = ", ".join(results.judges.get(source.task, [])) or DASH
        sizes = [number(float(np.mean(found)), 0) if found else DASH for found in texts]
        table.add(source.task, words, judges, *(f"{len(own[split]):,}" for split in SPLITS), *sizes)
    report = read_document(results.paths.sources) or {}
    for what in ("duplicates", "leakage"):
        found = {split: len(rows) for split, rows in report.get(what, {}).get("found", {}).items()}
        if found:
            counts = ", ".join(f"{count} in {split}" for split, count in found.items())
            table.letter(f"{what.capitalize()}: {counts} ({report[what]['what']}).")
    return table


def training(results: Results) -> Table:
    """What all cells share, and what they measured."""
    table, train = Table("Training, the same for every arm.", "setting", _words("value")), results.config.train
    table.add("seeds", ", ".join(map(str, results.config.seeds)))
    table.add("optimizer steps", f"{train.steps} of {train.batch_size} examples")
    table.add("peak learning rate", f"{train.learning_rate:g}, cosine schedule, {100 * train.warmup:g}% warm-up")
    table.add("cross-entropy on", LOSS_ON[train.loss_on])
    table.add("precision", train.precision)
    for name, label, digits in (("tokens", "student tokens per cell", 0), ("padding_share", "share of padding", 4)):
        values = sorted(cost[name] for cost in results.costs.values())
        if values:
            low, high = (f"{v:,.{digits}f}" for v in (values[0], values[-1]))
            table.add(label, low if low == high else f"{low} to {high}")
    table.add("restarts after an interruption", str(sum(cost["restarts"] for cost in results.costs.values())))
    return table


# ---------------------------------------------------------------- results
def shown_metrics(results: Results) -> list[str]:
    """The metrics that have a column."""
    found = {metric for _, metric, _ in results.arms}
    return [name for name, metric in METRICS.items() if not metric.column or name in found]


def result_table(results: Results, names: list[str] | None = None) -> Table:
    """One row per arm with one cell per metric, the untrained student first."""
    names = shown_metrics(results) if names is None else names
    caption = (
        f"Means over seeds and test items, macro-averaged over tasks, with {level(results)} intervals (not corrected)."
    )
    table = Table(caption, "arm", [Column(METRICS[name].label, METRICS[name].unit) for name in names])
    best = {name: _best(results, name, ALL) for name in names}
    for arm in [UNTRAINED, *results.arm_order]:
        table.arm(results, arm, *(_cell(results, arm, name, ALL, table, arm == best[name]) for name in names))
    return table


def tasks(results: Results) -> Table:
    """The main metrics of every task."""
    columns = [(name, task) for task in results.tasks for name, metric in METRICS.items() if metric.main]
    caption = f"The same for each task, with {level(results)} intervals (not corrected)."
    table = Table(caption, "arm", [Column(METRICS[name].label, METRICS[name].unit, task) for name, task in columns])
    best = {key: _best(results, *key) for key in columns}
    for arm in [UNTRAINED, *results.arm_order]:
        table.arm(results, arm, *(_cell(results, arm, *key, table, arm == best[key]) for key in columns))
    return table


def _best(results: Results, metric: str, task: str) -> str | None:
    found = {a: results.arms.get((a, metric, task)) for a in results.arm_order}
    # the mean of the seeds that are left is no mean to be best by
    whole = len(results.config.seeds)
    known = {arm: e.mean for arm, e in found.items() if e is not None and e.known and e.n_seeds >= whole}
    if not known:
        return None
    return (max if METRICS[metric].higher_is_better else min)(known, key=lambda arm: known[arm])


def _cell(results: Results, arm: str, metric: str, task: str, table: Table, best: bool) -> Cell:
    estimate = results.arms.get((arm, metric, task))
    if estimate is None or not estimate.known:
        return Cell(DASH, note=table.letter(_reason(results, arm, metric, estimate is None)))
    interval = ""
    if isfinite(estimate.low) and isfinite(estimate.high):
        interval = f"{shown(metric, estimate.low)} to {shown(metric, estimate.high)}"
    note, seeds = "", len(results.config.seeds)
    if arm != UNTRAINED and estimate.n_seeds < seeds:
        missing = results.missing_seeds(arm)
        why = f"{arm}: seed {', '.join(map(str, missing))} not finished" if missing else "the others never reached it"
        note = table.letter(f"Mean of {estimate.n_seeds} of {seeds} seeds: {why}.")
    return Cell(shown(metric, estimate.mean), interval, note, "best" if best else "")


def _reason(results: Results, arm: str, metric: str, no_row: bool) -> str:
    if arm == UNTRAINED and METRICS[metric].per != "item":
        return "Not trained."
    missing = [] if arm == UNTRAINED else results.missing_seeds(arm)
    if missing:
        return f"{arm}: seed {', '.join(map(str, missing))} not finished."
    if no_row:
        return f"The statistics hold no {METRICS[metric].label} for this arm."
    if not METRICS[metric].tested:
        return "No seed reached the final validation loss of control."
    return f"The statistics hold a missing value of {METRICS[metric].label} for this arm."


def ladder(results: Results) -> Table:
    """Every arm under the one that it is built on: what it changes, and what that brings."""
    table = Table(
        f"Ablation ladder: every arm beneath its base, what it changes in it, and {PRIMARY.label} as a ratio to the base's "
        f"and to control's, with {level(results)} intervals corrected for the family where there is a test.",
        "arm", [*_words("changes"), Column(PRIMARY.label), Column("ratio to its base"), Column("ratio to control"),
                *_words("against its base")],
    )  # fmt: skip
    bases = {name: entry.base for name, entry in results.config.arms.items()}

    def visit(name: str, depth: int) -> None:
        base = bases[name]
        before = components(results.dag.arms[base]) if base else {}
        parts = [f"{k}: {t}" for k, t in components(results.dag.arms[name]).items() if base and t != before[k]]
        direct = results.contrasts.get((name, base or "", PRIMARY.name, ALL))
        verdict = Cell(DASH) if direct is None else Cell(VERDICTS[direct.verdict], css=f"verdict {direct.verdict}")
        mean = _cell(results, name, PRIMARY.name, ALL, table, False)
        ratios = [_ratio(results, name, base), _ratio(results, name, results.control)]
        table.arm(results, name, "; ".join(parts) or (DASH if not base else "seeds, data or schedule"), mean, *ratios, verdict,
                  depth=depth)  # fmt: skip
        for other in (n for n in results.config.arms if bases[n] == name):
            visit(other, depth + 1)

    for name in (n for n, base in bases.items() if not base):
        visit(name, 0)
    return table


def _ratio(results: Results, arm: str, reference: str | None) -> str:
    """As tested; of a pair that is not, the ratio of the means."""
    if reference is None or arm == reference:
        return DASH
    found = results.contrasts.get((arm, reference, PRIMARY.name, ALL))
    if found is not None and found.tested:
        return ratio(found)
    both = [results.arms.get((name, PRIMARY.name, ALL)) for name in (arm, reference)]
    means = [one.mean for one in both if one is not None and one.known]
    return number(means[0] / means[1], 2) if len(means) == 2 else DASH


def equal_time(results: Results) -> Table:
    """What each arm has reached after the training time of the fastest."""
    curves = {arm: curve for arm in results.arm_order if len(curve := results.curve(arm))}
    curves = {arm: curve for arm, curve in curves.items() if curve.seconds.notna().all()}
    limit = min((curve.seconds.iloc[-1] for curve in curves.values()), default=float("nan"))
    table = Table(
        f"At equal time: validation loss after {number(limit, 1)} s of training, when the fastest arm had done all its "
        "steps. Training alone: what the teachers' pass and the fit take is in the cost sheet.",
        "arm", [Column("whole training", "s"), Column("steps by then"), Column("loss at equal time", "nats per token"),
                Column("loss at the end", "nats per token"), Column("time to control's final loss", "s")],
    )  # fmt: skip
    control = curves.get(results.control)
    for arm, curve in curves.items():
        at = {name: float(np.interp(limit, curve.seconds, curve[name])) for name in ("mean",)}
        steps = float(np.interp(limit, curve.seconds, curve.index))
        timed = curve.assign(validation_loss=curve["mean"], tokens=curve.seconds)
        reached = float("nan") if control is None else tokens_to(timed, control["mean"].iloc[-1])
        cells = [
            number(curve.seconds.iloc[-1], 1),
            number(steps, 0),
            number(at["mean"]),
            number(curve["mean"].iloc[-1]),
        ]
        table.arm(results, arm, *cells, number(reached, 1))
    return table


def difficulty(results: Results) -> Table:
    """The primary metric by task and third of its items."""
    found = results.by_difficulty
    caption = f"{PRIMARY.label.capitalize()} in each third of a task's test items, the easiest for the untrained student first"
    columns = [Column(name, "", task) for task in results.tasks for name in THIRDS]
    table = Table(f"{caption}; mean over seeds.", "arm", columns)
    for arm in results.arm_order if len(found) else ():
        if arm in found.columns.get_level_values("arm"):
            means = found[arm].mean(axis=1)
            keys = [(task, name) for task in results.tasks for name in THIRDS]
            table.arm(results, arm, *(number(float(means.get(key, np.nan))) for key in keys))
    return table


# ---------------------------------------------------------------- contrasts
def contrasts(results: Results, name: str = PRIMARY.name) -> Table:
    """Every contrast of a metric on all tasks together, by reference."""
    metric, first, second = METRICS[name], "Welch–Dunnett", "bootstrap, beside it"
    power = f"with {100 * results.config.stats.power:g}% probability"
    table = Table(
        f"{metric.label.capitalize()}: arm minus reference, {level(results)} intervals corrected for the family.", "arm",
        [Column("ratio", "", first), Column("difference", metric.change, first), Column("p", "", first),
         Column("effect", "in sd of runs", first), Column("detectable", power, first),
         Column("verdict", "", first, number=False), Column("seeds × items", "", second),
         Column("difference", metric.change, second), Column("Bonferroni p", "", second), Column("Holm p", "", second)],
    )  # fmt: skip
    found = [c for c in results.contrasts.values() if (c.metric, c.task) == (name, ALL)]
    for c in sorted(found, key=lambda c: results.arm_order.index(c.reference)):
        low, high = (signed(metric.factor * x, metric.digits) for x in (c.low_corrected, c.high_corrected))
        beside = (f"{low} to {high}", p_value(c.p_bonferroni), p_value(c.p_holm)) if c.tested else (DASH,) * 3
        table.arm(
            results, c.arm, ratio(c), change(c), p_value(c.p_dunnett), signed(c.effect_size_seeds, 1), detectable(c),
            Cell(VERDICTS[c.verdict], css=f"verdict {c.verdict}"), f"{c.n_seeds} × {c.n_items}", *beside,
            group=f"against {c.reference}",
        )  # fmt: skip
    return table


def pairs(results: Results) -> Table:
    """Pairs of trained models of one seed on the same items, from `pairs.csv`."""
    table = Table(
        f"Pairs of models of one seed on the same items: who alone was right (McNemar's exact test), and the difference of "
        f"bits per byte with a {level(results)} interval over items. It says nothing of other seeds, and so nothing of arms.",
        "model", [*_words("against"), Column("seed"), *_words("task"), Column("bits per byte"),
                  Column("right alone: model, other"), Column("p")],
    )  # fmt: skip
    for row in results.pairs.itertuples():
        bits = f"{signed(row.bits_per_byte)} ({signed(row.low)} to {signed(row.high)})"
        known = isfinite(row.p_mcnemar)
        right = f"{row.right_only_arm:.0f}, {row.right_only_reference:.0f} of {row.n_items}" if known else DASH
        table.arm(results, row.arm, row.reference, str(row.seed), row.task, bits, right, p_value(row.p_mcnemar))
    return table


# ---------------------------------------------------------------- teachers
def chosen_layers(results: Results) -> Table:
    """Which teacher layers every student layer learns from, and by which rule; arms that choose alike share a row."""
    found: dict[tuple[Any, ...], list[str]] = {}
    names = {id(arm): name for name, arm in results.dag.arms.items()}
    for teacher in results.dag.teachers:
        for arm, plan in results.plans(teacher):
            sides = [
                [_taken(i, b) for i, b in zip(plan.index[k].tolist(), plan.beta[k].tolist(), strict=True)]
                for k in (0, 1)
            ]
            cells = [k if k == v else f"k {k}; v {v}" for k, v in zip(*sides, strict=True)]
            found.setdefault((teacher, _rule(arm), *cells), []).append(names[id(arm)])
    wide = max((len(key) - 2 for key in found), default=0)
    caption = "Chosen layers: the teacher layers, with their weights, that each student layer learns from."
    layers = [Column(str(i), "", "student layer", number=False) for i in range(wide)]
    table = Table(caption, "teacher", [*_words("arms", "rule"), *layers])
    for (teacher, rule, *cells), users in found.items():
        table.add(teacher, ", ".join(users), rule, *cells)
    return table


def _taken(index: list[int], beta: list[float]) -> str:
    used = [(i, b) for i, b in zip(index, beta, strict=True) if b > 0]
    return ", ".join(f"{i}" if len(used) == 1 else f"{i} ({b:.2f})" for i, b in used)


def _rule(arm: Arm) -> str:
    layer = arm.layer
    if layer.kind != "cka":
        return {"proportional": "same relative depth", "kept": "depth in the whole model", "list": "as listed"}[
            layer.kind
        ]
    count = "" if layer.k == 1 else f"{layer.k} "
    near = "" if layer.near is None else f" at most {layer.near} from the same depth"
    what = "keys to keys, values to values" if layer.by == "kv" else "hidden states"
    joined = "" if layer.k == 1 else ", side by side" if layer.combine == "concat" else ", added"
    return f"the {count}most similar{near} ({what}){joined}"


def teachers(results: Results) -> Table:
    """Quality of each teacher on the test items, per task."""
    measured = [Column("items"), Column("bits per byte"), Column("perplexity"), Column("accuracy", "%")]
    caption = "What the teachers themselves achieve on the test items, over reasoning and answer."
    table = Table(caption, "teacher", [*_words("task"), *measured])
    for teacher in results.dag.judged_teachers:
        frame = results.teacher_items.get(teacher)
        if frame is None:
            table.add(teacher, "not measured", *[DASH] * 4)
            continue
        for task in results.tasks:
            part = frame[frame["task"] == task]
            scored = part["correct"].dropna()
            bits = number(part["nll"].sum() / part["bytes"].sum() / log(2), 3) if len(part) else DASH
            perplexity = number(float(np.exp(part["nll"].sum() / part["tokens"].sum())), 2) if len(part) else DASH
            # answers of some tasks are not scored: plain text, conversations
            accuracy = number(100 * float(scored.mean()), 1) if len(scored) else DASH
            table.add(teacher, task, str(len(part) or DASH), bits, perplexity, accuracy)
    return table


def written(results: Results) -> Table:
    """What teachers have written for the training prompts, by task."""
    heads = [
        Column("prompts"),
        Column("kept", "%"),
        Column("kept at try", number=False),
        Column("kept reasoning", "mean bytes"),
    ]
    caption = (
        "The reasoning that teachers have written for the training prompts: kept where the answer is right, at the first such "
        "try; for the others the reference stands in."
    )
    table = Table(caption, "teacher", [*_words("task"), *heads, Column("its reference", "mean bytes")])
    for teacher, found in results.text_counts.items():
        for task, counts in found["tasks"].items():
            share = number(100 * counts["kept"] / max(1, counts["asked"]), 1)
            sizes = (number(float(counts[key]), 0) for key in ("mean_bytes", "mean_bytes_of_reference"))
            table.add(teacher, task, f"{counts['asked']:,}", share, " / ".join(map(str, counts["kept_at_try"])), *sizes)
    return table


def readings(example: ReadExample) -> tuple[Table, Table]:
    """The texts of one record as student and teachers read it, and what each student token reads."""
    texts = Table("Two texts of one record, segment by segment.", "text of", _words("prompt", "reasoning", "answer"))
    for name, text in example.texts:
        texts.add(name, *(Cell(part, css="wrap") for part in text))
    heads = _words("segment", *(f"reads of {name}" for name in example.teachers))
    tokens = Table("The teacher token (@ its number) whose cache each student token reads.", "student token", heads)
    for token, segment, read in example.rows:
        tokens.add(token, segment, *(Cell(cell, css="hash") for cell in read))
    return texts, tokens


def stores(results: Results) -> Table:
    """Size and fidelity of the teacher KV stores."""
    table = Table(
        "Stores of the teachers' keys and values, computed once and read by all cells. Fidelity: cosine between attention "
        "outputs from the stored and from the exact cache.", "teacher",
        [*_words("has read", "type", "layers"), Column("tokens"), Column("size", "bytes per token"), Column("total", "MB"),
         Column("fidelity")],
    )  # fmt: skip
    for (teacher, reading), index in results.stores.items():
        per_token = index["bytes_per_token"]
        table.add(
            teacher, READ[reading], index["key"]["dtype"],
            ", ".join(map(str, index["key"]["layers"])), f"{index['rows']:,}", number(per_token, 0),
            number(index["rows"] * per_token / 1e6, 1), number(index["attention_cosine"], 6),
        )  # fmt: skip
    return table


# ---------------------------------------------------------------- cost, checks, provenance
def cost_sheet(results: Results) -> Table:
    """The cost sheet: every arm's training over all attempts, every other step, and the total."""
    caption = "Cost: time of all attempts and jobs. A job on a GPU holds it for its whole time."
    heads = [Column("jobs"), Column("hours"), Column("GPU hours"), Column("peak memory", "GB"), Column("restarts")]
    table = Table(caption, "of", heads)
    spending = results.spending
    for arm in results.arm_order:
        found = [c for (name, _), c in results.costs.items() if name == arm]
        if found:
            hours = (sum(c.get(key, c["train_seconds"] if key == "wall_seconds" else 0) for c in found) / 3600
                     for key in ("wall_seconds", "gpu_seconds"))  # fmt: skip
            peak = number(max(c["peak_memory_bytes"] for c in found) / 1e9, 2)
            restarts = str(sum(c["restarts"] for c in found))
            table.arm(
                results, arm, str(len(found)), *(number(h, 3) for h in hours), peak, restarts, group="training, by arm"
            )
    for row in spending[spending.step != "train"].itertuples():
        cells = (str(row.jobs), number(row.hours, 3), number(row.gpu_hours, 3), number(row.memory, 2), "")
        table.add(row.step, *cells, group="other steps, as the workflow measured them")
    total = (str(spending.jobs.sum()), *(number(float(spending[c].sum()), 3) for c in ("hours", "gpu_hours")))
    table.add("all", *total, number(float(spending.memory.max()) if len(spending) else np.nan, 2), "", group="total")
    if not set(spending.step) & set(ON_DEVICE):
        table.letter("The other steps ran outside Snakemake, which would have measured them.")
    return table


def checks(found: list[dict[str, Any]], caption: str) -> Table:
    """Findings of the audit or of the doctor."""
    table = Table(caption, "check", _words("status", "detail", "what to do"))
    for one in found:
        status = Cell(one["status"], css=f"status {one['status'].split()[-1]}")
        table.add(one["name"], status, Cell(one["detail"], css="wrap"), Cell(one.get("fix") or "", css="wrap"))
    return table


def provenance(results: Results) -> Table:
    """Each item with all values that the cells recorded: more than one means that they were not made alike."""
    table = Table("As the cells recorded it. Several values in a row: cells were made under different conditions.", "item",
                  _words("value"))  # fmt: skip
    documents = [cost["provenance"] for cost in results.costs.values()]
    flat = [
        {**{k: v for k, v in d.items() if k not in ("packages", "arm", "seed")}, **d.get("packages", {})}
        for d in documents
    ]
    labels = {"git_commit": "git commit", "config_hash": "configuration hash"}
    for key in dict.fromkeys(key for document in flat for key in document):
        values = sorted({str(d.get(key) or "none") for d in flat})
        table.add(labels.get(key, key), Cell(" · ".join(values), css="hash"))
    return table


def models(results: Results) -> Table:
    """Each model's source and the sha256 of its weights, or of its config where it has none."""
    table = Table(
        "Models: where they come from, and the digest of their files.", "model", _words("source", "file", "sha256")
    )
    for name in results.config.models:
        manifest = results.manifests.get(name)
        if manifest is None:
            table.add(name, "not built", "", "")
            continue
        source = manifest["source"]
        details = [f"{key} {source[key]}" for key in ("path", "repo", "commit", "like") if source.get(key)]
        words = ": ".join(filter(None, [source.get("source", ""), ", ".join(details)]))
        for file in [f for f in manifest["files"] if f.endswith(".safetensors")] or ["config.json"]:
            table.add(name, words, file, Cell(manifest["files"][file], css="hash"))
    return table


def tables(results: Results) -> dict[str, Table]:
    """Those that are files too, by name."""
    built = {"arms": arms, "results": result_table, "tasks": tasks, "ladder": ladder, "contrasts": contrasts,
             "equal_time": equal_time, "difficulty": difficulty, "data": data, "cost": cost_sheet}  # fmt: skip
    return {name: built[name](results) for name in TABLES}
