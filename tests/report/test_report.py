"""The report: says what the tables say, shows what is missing, and is one self-contained, escaped, repeatable file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from kvpipe.config import load
from kvpipe.data import build as data
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import digest
from kvpipe.report import collect, figures, render, tables, wording
from kvpipe.report.render import SAMPLES_PER_TASK, provenance, samples
from kvpipe.stats.metrics import METRICS as ENTRIES
from kvpipe.stats.metrics import Metric
from kvpipe.stats.scores import ITEM_METRICS
from kvpipe.stats.tables import write_stats
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.models import make_model

ROOT = Path(__file__).parents[2]
METRICS = ["bits_per_byte", "log_perplexity", "accuracy", "tokens_to_control"]
COST = ["train_seconds", "peak_memory_bytes"]
CONTROL = {
    "bits_per_byte": 0.6,
    "log_perplexity": 0.9,
    "accuracy": 0.35,
    "tokens_to_control": 5e5,
    "train_seconds": 30.0,
    "peak_memory_bytes": 1.1e9,
}
HALF = 0.03
"""Half width of a 95% interval as a share of control's value; the corrected one is 1.6 times as wide."""
SHIFT = {
    "exp1": -0.12, "exp2": -0.14, "exp3": -0.1, "exp4": -0.2, "exp5": -0.22, "exp6": -0.17, "full": -0.3,
    "logit-kd": -0.06, "relation": -0.02, "full-joint": 0.06, "null-shuffled": 0.08, "null-random": 0.01,
    "null-control": -0.01, "misaligned": 0.2, "control": 0.0, "untrained": 3.0,
}  # fmt: skip
"""How an arm's score differs from control's, as a share of it; negative is better."""


def workspace(root: Path, *overrides: str, config: Path = ROOT / "config/config.yaml") -> Inputs:
    tasks = [f"{{kind: embedded, task: {task}, train: 40, validation: 9, test: 11}}" for task in ("math", "code")]
    settings = [f"data.sources=[{', '.join(tasks)}]", "stats.resamples=1000", "seeds=[0, 1, 2]"]
    settings += [f"models.{name}.path={ROOT}/config/embedded/{name}" for name in ("math", "code")]
    return Inputs(load(config, [*settings, *overrides]), Paths(root))


def write_report(work: Inputs, out: Path) -> None:
    render.write_report(work.config, work.paths, out)


def Results(work: Inputs) -> collect.Results:
    return collect.Results(work.config, work.paths)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def fake_results(work: Inputs, text: str = "3 + 4 = 7.\n#### 7\n") -> None:
    """Real data and models; all later artefacts invented, in the formats of the steps that write them."""
    rng = np.random.default_rng(5)
    data.build(work.config.data, work.paths.data("train").parent)
    for name in ("student", "math", "code", "math-random", "code-random"):
        make_model(work, name)
    fake_stats(work)
    ids = {r.id: r for r in work.records("test")}
    hardness = rng.uniform(0.5, 1.5, len(ids))
    for arm, seed in work.dag.cells:
        fake_cell(work, arm, seed, rng)
        fake_items(work.paths.items(arm, seed), ids, 1 + SHIFT[arm], hardness, rng, text)
    for teacher in ("math", "code"):
        fake_items(work.paths.teacher_quality(teacher), ids, 0.4, hardness, rng, text)
    for teacher in work.dag.teachers:
        layers = {"math": 4, "code": 5}[teacher.removesuffix("-random")]
        similarity = {kind: rng.uniform(0, 0.9, (3, layers)).tolist() for kind in ("keys", "values", "hidden")}
        document = {"teacher": teacher, "src_layers": layers, "dst_layers": 3, "rows": 50, "similarity": similarity}
        document["sha256"] = digest(similarity, 64)
        write_json(work.paths.layer_map(teacher), document)
        index = {"bytes_per_token": 1220.4, "rows": 1144, "attention_cosine": 0.999982, "shards": []}
        index["key"] = {"dtype": "bf16", "layers": list(range(layers))}
        write_json(work.paths.store(teacher, "student") / "index.json", index)
    for fit_id, arm in work.dag.fits.items():
        variance = {t: {k: rng.uniform(0.5, 1, 3).tolist() for k in ("keys", "values")} for t in arm.teachers}
        document = {"fit": work.dag.fit_spec(arm), "rows": 99, "explained_variance": variance}
        write_json(work.paths.projector(fit_id).parent / f"{fit_id}.json", document)
    check = {"name": "leakage", "status": "ok", "detail": "0 of 22 test items in train"}
    write_json(work.paths.root / "audit.json", {"checks": [check]})
    finding = {"name": "disk", "status": "would fail", "detail": "1 GB free", "fix": "df -h"}
    write_json(work.paths.root / "doctor.json", {"findings": [finding]})


def fake_stats(work: Inputs, nan: tuple[str, str] | None = None, **shift: float) -> None:
    """The tables as `shift` (arm with _ for -) has it; `nan`: an (arm, metric) without a value."""
    share = SHIFT | {name.replace("_", "-"): value for name, value in shift.items()}
    for folder, metrics in ((work.paths.stats, METRICS), (work.paths.costs, COST)):
        arms, contrasts = [], []
        for metric in metrics:
            sign, scale = (-1 if metric == "accuracy" else 1), CONTROL[metric]
            by_task = metric in METRICS[:3]
            names = ["untrained", *work.dag.arms] if by_task else list(work.dag.arms)
            pairs = [(a, "control") for a in work.dag.arms if a != "control"]
            pairs += [(a, "exp1") for a in ("exp2", "exp3", "exp4", "exp5", "exp6", "full")]
            for task in ["all", "math", "code"] if by_task else ["all"]:
                for arm in names:
                    mean = math.nan if (arm, metric) == nan else max(scale * (1 + sign * share[arm]), 0.0)
                    arms.append([arm, metric, task, mean, mean * 0.96, mean * 1.04, 0 if mean != mean else 3, 22])
                for arm, reference in pairs:
                    d = math.nan if (arm, metric) == nan else sign * scale * (share[arm] - share[reference])
                    half, tested = HALF * scale, metric != "tokens_to_control"
                    p = math.nan if d != d or not tested else 0.0002 if abs(d) > 1.6 * half else 0.4
                    verdict = "undecided" if p == 0.4 else "better" if sign * d < 0 else "worse"
                    row = {"arm": arm, "reference": reference, "metric": metric, "task": task, "estimate": d}
                    row |= {"verdict": verdict if p == p else "missing" if d != d else "untested", "mde": 0.04 * scale}
                    row |= {"p_dunnett": min(1, 14 * p), "p_bonferroni": min(1, 20 * p), "p_holm": min(1, 14 * p)}
                    row |= {"effect_size_seeds": d / scale * 4, "mde_ratio": 0.93, "n_seeds": 3, "n_items": 22}
                    ratio = math.exp(d) if metric == "log_perplexity" else (1 + share[arm]) / (1 + share[reference])
                    for end, wide in (("", 1.6), ("_plain", 1.0)):
                        for side, way in (("low", -wide), ("high", wide)):
                            row[f"difference_{side}{end}"] = d + way * half if p == p else math.nan
                            row[f"ratio_{side}{end}"] = ratio * (1 + way * HALF) if sign > 0 and p == p else math.nan
                    row |= {"ratio": ratio if sign > 0 and p == p else math.nan}
                    row |= {"low_corrected": d - 1.7 * half, "high_corrected": d + 1.7 * half}
                    contrasts.append(row)
        folder.mkdir(parents=True, exist_ok=True)
        columns = ["arm", "metric", "task", "mean", "low", "high", "n_seeds", "n_items"]
        pd.DataFrame(arms, columns=columns).to_csv(folder / "arms.csv", index=False)
        pd.DataFrame(contrasts).to_csv(folder / "contrasts.csv", index=False)


def fake_cell(work: Inputs, name: str, seed: int, rng: np.random.Generator) -> None:
    arm, folder = work.dag.arms[name], work.paths.cell(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(0, 401, 25):
        loss = (0.9 + 5 * math.exp(-step / 60)) * (1 + SHIFT[name]) + rng.uniform(0, 0.03)
        lines.append({"step": step, "tokens": 1250 * step, "validation_loss": loss})
        if step:
            weight = {
                f"weight/{task}/{teacher}": share * 0.95  # a twentieth of the positions is masked
                for task, table in (("math", (0.7, 0.3)), ("code", (0.2, 0.8)))
                for teacher, share in zip(arm.teachers, table if len(arm.teachers) == 2 else (1.0,), strict=False)
            }
            lines.append({"step": step, "tokens": 1250 * step, "ce": loss, "grad_norm": 1.0, **weight})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    provenance = {"git_commit": "abc123", "packages": {"torch": "2.13.0"}, "python": "3.11", "container": None}
    provenance |= {"arm": name, "seed": seed, "host": "node1", "device": "cpu", "config_hash": "591f1e78"}
    cost = {"train_seconds": 30.5, "peak_memory_bytes": 1.2e9, "steps": 400, "tokens": 502598, "padding_share": 0.004}
    write_json(folder / "cost.json", {**cost, "restarts": 0, "provenance": provenance})


def fake_items(path: Path, records: dict, share: float, hardness: np.ndarray, rng, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nll = 25 * share * hardness * rng.uniform(0.85, 1.15, len(hardness))
    frame = pd.DataFrame({"id": list(records), "task": [r.task for r in records.values()], "nll": nll})
    frame = frame.assign(tokens=30, bytes=60, nll_all=nll * 2, tokens_all=70, bytes_all=150, text=text, prediction="7")
    frame["correct"] = rng.uniform(0, 1, len(nll)) > 0.65 * share * hardness
    frame["reference"] = [r.answer for r in records.values()]
    frame.attrs["judges"] = {"math": "math-verify 9.8.7", "code": "kvpipe, as texts"}
    frame.to_parquet(path)


# ---------------------------------------------------------------- fixtures
@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("results")
    fake_results(workspace(root))
    return root


@pytest.fixture
def work(finished, tmp_path) -> Inputs:
    """A copy that a test may change."""
    shutil.copytree(finished, tmp_path / "results", symlinks=True)
    return workspace(tmp_path / "results")


@pytest.fixture(scope="session")
def whole(finished) -> str:
    """The report of the finished results."""
    return report(workspace(finished))


def report(work: Inputs) -> str:
    out = work.paths.root / "report.html"
    write_report(workspace(work.paths.root), out)
    return out.read_text(encoding="utf-8")


def leads(work: Inputs, *overrides: str) -> dict[str, str]:
    """Lead of every conclusion → its tone."""
    return {s.lead: s.tone for s in wording.conclusions(Results(workspace(work.paths.root, *overrides)))}


class Page(HTMLParser):
    """Checks that elements nest, and collects tags, attributes and text."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input", "path", "use", "rect"})

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing, line {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# ---------------------------------------------------------------- the page
def test_page_is_whole_small_and_self_contained(finished, whole):
    work, text = workspace(finished), whole
    page = Page(text)
    assert len(text.encode()) < 3_000_000
    assert page.tags.count("svg") >= 7
    for forbidden in ("http:", "https:", "<script", "<link", "@import", "url(http", str(work.paths.root)):
        assert forbidden not in text, forbidden
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    ids = {value for name, value in page.attributes if name == "id"}
    assert links
    outside = [
        link for link in links if not link.startswith("data:image/png;base64,") and link.removeprefix("#") not in ids
    ]
    assert not outside
    assert "incomplete" not in page.text
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())
    assert "None" not in page.text
    for arm in work.dag.arms:
        assert page.text.count(arm) > 3, arm


def test_the_page_says_who_judged_the_answers(whole):
    text = Page(whole).text
    assert (
        "answers of math judged by math-verify 9.8.7" in text and "answers of code judged by kvpipe, as texts" in text
    )


def test_page_is_the_same_every_time_and_wherever_it_is_made(work, whole):
    assert report(work) == whole


def test_other_names_give_the_same_page(work, whole, tmp_path):
    """Every arm renamed: the same words and numbers, in the same order, but for the names."""
    write_stats(work.dag, work.paths, work.paths.items(work.config.control, 0))
    before = Page(report(work)).text
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    # of the same length, so that no line wraps elsewhere, and sorted the other way
    names = {old: f"{chr(ord('z') - i)}q{'x' * (len(old) - 2)}" for i, old in enumerate(sorted(values["arms"]))}
    values["arms"] = {names[old]: {**e, "base": names.get(e.get("base"))} for old, e in values["arms"].items()}
    stats = values["stats"]
    stats["headline"], stats["contrasts"] = (
        names[stats["headline"]],
        [[names[a] for a in p] for p in stats["contrasts"]],
    )
    (tmp_path / "renamed.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for folder in ("train", "evaluate"):
        for old, new in names.items():
            (work.paths.root / folder / old).rename(work.paths.root / folder / new)
    for path in work.paths.root.glob("train/*/*/cost.json"):
        cost = json.loads(path.read_text())
        cost["provenance"]["arm"] = names[cost["provenance"]["arm"]]
        path.write_text(json.dumps(cost))
    renamed = workspace(work.paths.root, config=tmp_path / "renamed.yaml")
    write_stats(renamed.dag, renamed.paths, renamed.paths.items(names["control"], 0))
    write_report(renamed, tmp_path / "renamed.html")
    after = Page((tmp_path / "renamed.html").read_text(encoding="utf-8")).text
    for old, new in names.items():
        after = after.replace(new, old)
    assert after == before


def test_generated_text_is_escaped(tmp_path):
    work = workspace(tmp_path)
    fake_results(work, text='<script>alert("x")</script><b>&amp; $x^2$ {{ 7 * 7 }}\x00')
    text = report(work)
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text
    assert "&amp;amp; $x^2$ {{ 7 * 7 }}" in text
    Page(text)


def test_hostile_title_and_labels_are_escaped(work):
    work = workspace(work.paths.root, "title=<img src=x>", "arms.exp1.label='\"><i>'")
    out = work.paths.root / "report.html"
    write_report(work, out)
    assert "<img" not in out.read_text(encoding="utf-8")
    assert "<i>" not in out.read_text(encoding="utf-8")


# ---------------------------------------------------------------- conclusions follow the tables
def test_full_better(work):
    found = leads(work)
    assert found["full beats control."] == "good"
    assert found["null-shuffled shows no benefit:"] == "good"  # worse than control is no benefit
    assert found["null-control is equal to control:"] == "good"  # its interval lies within the margin
    assert found["Convergence:"] == "neutral"  # described, not tested


def test_full_undecided_says_so(work):
    fake_stats(work, full=-0.04)  # inside the corrected interval (1.6 · 0.03), outside the plain one
    found = leads(work)
    assert found["full is not shown to beat control."] == "neutral"
    assert "full beats control." not in found


def test_full_worse_says_so(work):
    fake_stats(work, full=0.2)
    assert leads(work)["full is worse than control."] == "bad"
    assert leads(work)["Accuracy is worse."] == "bad"


def test_null_that_helps_is_called_out(work):
    for shift in (-0.1, -0.04):  # -0.04 is outside the plain interval only: no correction helps a null to pass
        fake_stats(work, null_shuffled=shift)
        assert leads(work, "stats.margin=0.05")["null-shuffled is not null:"] == "bad"
        assert leads(work)["null-shuffled shows no benefit:"] == "good"  # by the margin that was set before the run


def test_control_under_other_seeds_must_not_differ_either_way(work):
    for shift in (-0.1, 0.1):
        fake_stats(work, null_control=shift)
        assert leads(work, "stats.margin=0.05")["null-control is not null:"] == "bad"


def test_an_interval_that_holds_both_1_and_the_margin_decides_nothing(work):
    fake_stats(work, null_control=0.02, null_random=-0.02, null_shuffled=0.02)
    found = leads(work, "stats.margin=0.03")
    assert found["null-control is undecided:"] == found["null-random is undecided:"] == "neutral"
    assert found["null-shuffled shows no benefit:"] == "good", "worse than the margin is no benefit either"


def test_numbers_are_those_of_the_tables(whole):
    text = Page(whole).text
    assert "incomplete" not in text
    assert (
        "0.420 against 0.600 bits per byte: 0.70 × control’s (0.67 to 0.73), −0.180 (−0.209 to −0.151) bits per byte, "
        "p 0.0028." in text
    )
    assert "1.878 against 2.460: 0.76 × control’s (0.73 to 0.80), p 0.0028." in text
    assert "45.5% against 35.0%: +10.5 (+8.8 to +12.2) points, p 0.0028." in text
    assert "Welch–Dunnett over seeds" in text and "Thick: 95% interval" in text
    assert "350 thousand training tokens, 70% of what control needs" in text
    assert "95% interval" in text and "90% interval" not in text


def test_the_confidence_is_the_one_that_was_asked_for(work):
    asked = workspace(work.paths.root, "stats.confidence=0.9", "stats.power=0.7")
    fake_stats(asked, full=-0.04)
    out = work.paths.root / "report.html"
    write_report(asked, out)
    text = Page(out.read_text(encoding="utf-8")).text
    assert "95%" not in text and "(90% interval, not corrected" in text and "with 90% intervals" in text
    assert "would be found with 70% probability" in text


def change(work, table: str, rows, **values) -> None:
    """Some rows of `contrasts.csv` changed."""
    path = work.paths.stats / table
    frame = pd.read_csv(path)
    frame.loc[rows(frame), list(values)] = list(values.values())
    frame.to_csv(path, index=False)


UNTESTED = dict.fromkeys(("low_corrected", "high_corrected", "p_dunnett", "p_bonferroni", "p_holm", "ratio"), np.nan)
UNTESTED |= {"verdict": "untested"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_contrast_of_fewer_seeds_is_flagged_first_and_concludes_nothing(work, seeds):
    for arm in ("full", "null-shuffled", "exp2"):
        change(work, "contrasts.csv", lambda f, arm=arm: f.arm == arm, n_seeds=seeds, **UNTESTED)
    found = leads(work)
    assert found["full against control is not tested."] == "neutral"
    assert found["null-shuffled is not tested:"] == "missing"
    assert not [lead for lead, tone in found.items() if tone == "good" and "full" in lead]
    out = work.paths.root / "report.html"
    write_report(workspace(work.paths.root), out)
    text = Page(out.read_text(encoding="utf-8")).text
    first = text[: text.index("What was run", text.index("This report is incomplete"))]
    assert f"Not tested: full − control, {seeds} of 3 seeds (bits_per_byte, log_perplexity, accuracy" in first
    assert "not tested against exp1: exp2 (−0.012) and full (−0.108)" in first
    rows = [row for row in tables.contrast_rows(Results(workspace(work.paths.root))) if row["arm"] == "full"]
    assert {
        (row["p"], row["holm"], row["bootstrap"], row["verdict_text"]) for row in rows if row["metric"] in METRICS
    } == {("–", "–", "–", "not tested")}


def test_one_planned_seed_is_said_first(work):
    one = workspace(work.paths.root, "seeds=[0]")
    change(one, "contrasts.csv", lambda f: f.arm != "", n_seeds=1, **UNTESTED)
    assert any(line.startswith("One seed: ") for line in Results(one).absent)
    assert not [s for s in wording.conclusions(Results(one)) if s.tone == "good"]


def test_the_best_of_a_column_has_all_seeds(work):
    change(work, "arms.csv", lambda f: f.arm == "full", n_seeds=2)
    rows = tables.result_rows(Results(workspace(work.paths.root)), ["bits_per_byte"], "all", tables.Notes())
    assert [row["name"] for row in rows if row["cells"][0].best] == ["exp5"]


def test_baselines_are_compared_directly_where_the_tables_do(work):
    lead = "full (0.420 bits per byte) against the baselines:"
    assert leads(work)[lead] == "neutral"
    path = work.paths.stats / "contrasts.csv"
    table = pd.read_csv(path)
    for verdict, tone in (("better", "good"), ("worse", "bad")):
        row = table[(table.arm == "full") & (table.reference == "control") & (table.task == "all")].copy()
        row["reference"] = "logit-kd"
        row["verdict"] = verdict
        pd.concat([table, row]).to_csv(path, index=False)
        assert leads(work)[lead] == tone
    assert "against logit-kd" in figures.forest(Results(workspace(work.paths.root))).svg


def test_breach_of_fairness_comes_first(work):
    check = {"name": "tokens", "status": "allowed", "detail": "differ by 9%"}
    write_json(work.paths.root / "audit.json", {"checks": [check]})
    assert next(iter(leads(work))) == "The comparison is not fair."


# ---------------------------------------------------------------- what is missing is shown
def test_missing_value_is_a_dash_with_its_reason(work):
    fake_stats(work, nan=("exp3", "tokens_to_control"))
    results, notes = Results(workspace(work.paths.root)), tables.Notes()
    rows = {row["name"]: row["cells"] for row in tables.result_rows(results, ["tokens_to_control"], "all", notes)}
    assert rows["exp3"][0].text == wording.DASH
    assert "No seed reached" in dict(notes.items())[rows["exp3"][0].note]
    assert rows["exp2"][0].note == ""
    assert "Not trained." in dict(notes.items())[rows["untrained"][0].note]


def test_missing_contrast_is_not_a_conclusion(work):
    fake_stats(work, nan=("full", "bits_per_byte"))
    assert leads(work)["full against control: no result."] == "missing"
    picture = figures.forest(Results(workspace(work.paths.root)))
    assert picture is not None
    assert picture.svg.count("no result") == 2  # against control and against exp1


def test_missing_cells_and_checks_are_named(work):
    shutil.rmtree(work.paths.cell("exp2", 1))
    work.paths.items("null-random", 2).unlink()
    shutil.rmtree(work.paths.root / "train" / "exp4")
    work.paths.teacher_quality("code").unlink()
    for name in ("audit.json", "doctor.json"):
        (work.paths.root / name).unlink()
    text = Page(report(work)).text
    assert "5 of 45 cells are not finished: exp2/seed1, exp4, null-random/seed2." in text
    assert "Teacher quality was not measured for code." in text
    assert "code not measured – – – –" in text
    assert "audit.json) is absent" in text
    assert "doctor.json) are absent" in text


def test_bare_statistics_are_enough(work):
    for name in ("train", "evaluate", "teacher_quality", "layer_map", "projector", "teacher_kv", "cost"):
        shutil.rmtree(work.paths.root / name)
    for name in ("audit.json", "doctor.json"):
        (work.paths.root / name).unlink()
    text = Page(report(work)).text
    assert "45 of 45 cells are not finished" in text
    assert "full beats control." in text
    for absence in ("No cell has a history yet", "No fit has been made", "No store was built", "No layer map was made"):
        assert absence in text


def test_missing_statistics_are_an_error(work):
    (work.paths.stats / "contrasts.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"contrasts\.csv is missing: run `kvpipe stats`"):
        report(work)


def test_missing_column_is_an_error(work):
    path = work.paths.stats / "contrasts.csv"
    pd.read_csv(path).drop(columns="high_corrected").to_csv(path, index=False)
    with pytest.raises(ValueError, match="high_corrected"):
        report(work)


# ---------------------------------------------------------------- parts
def test_fusion_weights_are_shares(work):
    found = tables.fusion_weights(Results(work)).set_index(["arm", "task"])
    assert found.loc[("full", "math"), ["math", "code"]].tolist() == pytest.approx([0.7, 0.3])
    assert found.loc[("full", "code"), ["math", "code"]].tolist() == pytest.approx([0.2, 0.8])
    assert "exp1" not in found.index.get_level_values("arm")


def test_changed_components_are_marked(work):
    rows = {row["name"]: row["parts"] for row in tables.arm_rows(Results(work))}
    assert [text for text, changed in rows["exp2"] if changed] == ["elastic, frozen", "reconstruct"]
    assert [text for text, changed in rows["null-control"] if changed] == []
    assert [text for text, changed in rows["null-shuffled"] if changed] == ["math, code (shuffled)"]


def test_samples_are_the_first_items_whatever_came_out(work):
    shown = [s["record"].id for s in samples(Results(work))]
    expected = [[r.id for r in work.records("test") if r.task == task][:SAMPLES_PER_TASK] for task in ("math", "code")]
    assert shown == [*expected[0], *expected[1]]


def test_two_commits_are_both_shown(work):
    path = work.paths.cell("exp1", 0) / "cost.json"
    cost = json.loads(path.read_text())
    cost["provenance"]["git_commit"] = "def456"
    write_json(path, cost)
    assert dict(provenance(Results(work)))["git commit"] == ["abc123", "def456"]


def test_report_of_the_real_statistics(work):
    """The tables as the statistics step writes them are understood, with a missing cell."""
    shutil.rmtree(work.paths.cell("exp5", 2))
    work.paths.items("exp5", 2).unlink()
    write_stats(work.dag, work.paths, work.paths.items("control", 0))
    text = Page(report(work)).text
    assert "full beats control." in text
    assert "exp5/seed2" in text
    assert "Mean of 2 of 3 seeds: exp5: seed 2 not finished." in text


@pytest.mark.parametrize("per", ["item", "cost"])
def test_a_new_metric_is_one_entry(work, monkeypatch, per):
    """Entered in the table, it is measured, compared and on the page."""
    measure = {"item": lambda d: d.tokens / d.bytes, "cost": lambda cost: 1 + cost["padding_share"]}[per]
    entry = Metric("extra", "extra thing", "furlongs", "furlongs", per, measure, main=per == "item")
    monkeypatch.setitem(ENTRIES, "extra", entry)
    if per == "item":
        monkeypatch.setitem(ITEM_METRICS, "extra", entry)
    write_stats(work.dag, work.paths, work.paths.items("control", 0))
    page = Page(report(work)).text
    assert "extra thing furlongs" in page and "Extra thing: " in page
    assert ("extra thing, furlongs" in page) == (per == "item"), "in the table per task"
    folder = work.paths.stats if per == "item" else work.paths.costs
    table = pd.read_csv(folder / "contrasts.csv")
    assert set(table[table.metric == "extra"].verdict) == {"constant"}


def test_the_units_of_a_contrast(work):
    results = Results(workspace(work.paths.root))
    found = {m: wording.difference(results.contrasts["full", "control", m, "all"]) for m in METRICS}
    assert found["tokens_to_control"] == "−150 thousand tokens (3 seeds, not tested)"
    constant = dataclasses.replace(results.contrasts["full", "control", "accuracy", "all"], verdict="constant")
    assert wording.difference(constant) == "+10.5 points (seeds do not vary, not tested)"
    assert wording.detectable(results.contrasts["full", "control", "bits_per_byte", "all"]) == "× 0.93"
    assert wording.detectable(constant) == "1.4"


def test_numbers_as_text():
    assert wording.number(-0.12345) == "−0.123"
    assert wording.number(math.nan) == wording.DASH
    assert wording.number(-math.inf) == "−∞"
    assert wording.signed(0.5, 1) == "+0.5"
    assert wording.p_value(0.00001) == "<0.0001"
    assert wording.shown("log_perplexity", math.log(2)) == "2.000"
    assert wording.shown("accuracy", 0.256) == "25.6"
    assert wording.listed(["a", "b", "c"]) == "a, b and c"
