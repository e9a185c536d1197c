"""The report: says what the tables say, shows what is missing, and is one self-contained, escaped, repeatable file."""

from __future__ import annotations

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
from matplotlib.text import Text

from kvpipe.config import load
from kvpipe.data import build as data
from kvpipe.experiment.paths import FIGURES, TABLES, Paths
from kvpipe.experiment.plan import digest
from kvpipe.report import collect, figures, render, style, tables, wording
from kvpipe.report.render import SAMPLES_PER_TASK, samples
from kvpipe.report.table import Column, Table
from kvpipe.stats.metrics import METRICS as ENTRIES
from kvpipe.stats.metrics import Metric
from kvpipe.stats.scores import ITEM_METRICS
from kvpipe.stats.tables import CONTRAST_COLUMNS, write_stats
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
    "null-control": -0.01, "misaligned": 0.2, "control": 0.0, "untrained": 3.0, "plain": 0.0, "with-values": -0.2,
}  # fmt: skip
"""How an arm's score differs from control's, as a share of it; negative is better."""


def workspace(root: Path, *overrides: str, config: Path = ROOT / "config/config.yaml") -> Inputs:
    tasks = [
        f"{{kind: embedded, task: {task}, train: 40, validation: 9, test: 11}}" for task in ("math", "code", "both")
    ]
    settings = [f"data.sources=[{', '.join(tasks)}]", "stats.resamples=1000", "seeds=[0, 1, 2]"]
    settings += [f"models.{name}.path={ROOT}/config/embedded/{name}" for name in ("math", "code")]
    return Inputs(load(config, [*settings, *overrides]), Paths(root))


def write_report(work: Inputs, out: Path, draw: bool = False) -> None:
    """The page; its figures take seconds, and are drawn where a test is about them."""
    results = Results(work)
    drawn = {name: figure for name, of in figures.DRAWERS.items() if draw and (figure := of(results)) is not None}
    out.write_text(render.page(results, tables.tables(results), drawn), encoding="utf-8")


def Results(work: Inputs) -> collect.Results:
    return collect.Results(work.config, work.paths)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def fake_results(work: Inputs, text: str = "3 + 4 = 7.\n#### 7\n") -> None:
    """Real data and models; all later artefacts invented, in the formats of the steps that write them."""
    rng = np.random.default_rng(5)
    data.build(work.config.data, work.paths.data("train").parent)
    for name in work.config.models:
        make_model(work, name)
    fake_stats(work)
    ids = {r.id: r for r in work.records("test")}
    hardness = rng.uniform(0.5, 1.5, len(ids))
    for arm, seed in work.dag.cells:
        fake_cell(work, arm, seed, rng)
        fake_items(work.paths.items(arm, seed), ids, 1 + SHIFT[arm], hardness, rng, text)
    for teacher in work.dag.judged_teachers:
        fake_items(work.paths.teacher_quality(teacher), ids, 0.4, hardness, rng, text)
    for teacher in work.dag.teachers:
        layers = 5 if teacher.startswith("code") else 4
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
    fake_items(work.paths.untrained, ids, 2, hardness, rng, text)
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
            control = work.config.control
            pairs = [(a, control) for a in work.dag.arms if a not in (control, "misaligned")]
            pairs += [(a, "exp1") for a in ("exp2", "exp3", "exp4", "exp5", "exp6", "full") if a in work.dag.arms]
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
        pd.DataFrame(contrasts, columns=CONTRAST_COLUMNS).to_csv(folder / "contrasts.csv", index=False)


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
            weight |= {
                f"layer/{kind}/{i}": loss / (i + 1) for kind in ("keys", "values") for i in range(3) if arm.teachers
            }
            lines.append({"step": step, "tokens": 1250 * step, "ce": loss, "grad_norm": 1.0, **weight})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    provenance = {"git_commit": "abc123", "packages": {"torch": "2.13.0"}, "python": "3.11", "container": None}
    provenance |= {"arm": name, "seed": seed, "host": "node1", "device": "cpu", "config_hash": "591f1e78"}
    cost = {"train_seconds": 30.5, "peak_memory_bytes": 1.2e9, "steps": 400, "tokens": 502598, "padding_share": 0.004}
    if arm.fuse.kind == "attention":
        weights = rng.uniform(0, 1, (8, 3, 1))
        cost["router"] = {"examples": [*range(0, 80, 10)], "teachers": arm.teachers}
        cost["router"] |= {"weights": np.concatenate([weights, 1 - weights], 2).tolist()}
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
    """The report of the finished results, with figures and files."""
    work = workspace(finished)
    render.write_report(work.config, work.paths, work.paths.report)
    return work.paths.report.read_text(encoding="utf-8")


def report(work: Inputs) -> str:
    out = work.paths.root / "report.html"
    write_report(workspace(work.paths.root), out)
    return out.read_text(encoding="utf-8")


def leads(work: Inputs, *overrides: str) -> dict[str, str]:
    """Lead of every conclusion → its tone."""
    results = Results(workspace(work.paths.root, *overrides))
    return {s.lead: s.tone for s in (wording.answer(results), *wording.conclusions(results))}


def words(figure) -> str:
    """All that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


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
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# ---------------------------------------------------------------- the page
def test_page_is_whole_small_and_self_contained(finished, whole):
    work, text = workspace(finished), whole
    page = Page(text)
    assert len(text.encode()) < 3_000_000
    assert page.tags.count("svg") == len(FIGURES) and page.tags.count("script") == 1
    for forbidden in ("http:", "https:", "<link", "@import", "url(http", str(work.paths.root)):
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


def test_the_page_says_who_judged_the_answers(work):
    judges = [row.cells[1].text for row in tables.data(Results(work)).rows]
    assert judges == ["math-verify 9.8.7", "kvpipe, as texts", "–"], "of both nothing is scored"


def test_page_is_the_same_every_time_and_wherever_it_is_made(work, whole):
    write_report(work, work.paths.report, draw=True)
    assert work.paths.report.read_text(encoding="utf-8") == whole


def test_tables_are_told_apart_by_those_who_do_not_see_them(whole):
    page = Page(whole)
    assert page.tags.count("table") == page.tags.count("caption") == page.tags.count("thead")
    scopes = [value for name, value in page.attributes if name == "scope"]
    assert len(scopes) == page.tags.count("th")
    boxes = [value for name, value in page.attributes if (name, value) == ("class", "scroll")]
    assert len(boxes) == len([name for name, value in page.attributes if (name, value) == ("role", "region")])
    for label in ("one teacher, token overlap", "cross-entropy only"):
        assert page.text.count(label) > 5, "beside the arm's name"


def test_figures_and_tables_are_files_with_their_fonts(finished, whole):
    paths = Paths(finished)
    assert {p.name for p in paths.figures.iterdir()} == {f"{n}.{end}" for n in FIGURES for end in ("svg", "pdf")}
    assert {p.name for p in paths.table_files.iterdir()} == {f"{n}.{end}" for n in TABLES for end in ("csv", "tex")}
    for name in FIGURES:
        assert b"/FontFile2" in (paths.figures / f"{name}.pdf").read_bytes()
        assert "<text" not in (paths.figures / f"{name}.svg").read_text(encoding="utf-8"), "letters are outlines"
    for name in TABLES:
        tex, csv = (paths.table_files / f"{name}.{end}" for end in ("tex", "csv"))
        text = tex.read_text(encoding="utf-8")
        assert all(rule in text for rule in ("\\toprule", "\\midrule", "\\bottomrule", "\\caption{"))
        assert len(pd.read_csv(csv)) == text.count("\\\\\n") - 1
    assert re.search(r"full & 0\.420 \(0\.403 to 0\.437\) & ", (paths.table_files / "results.tex").read_text("utf-8"))
    captions = {p.stem for p in (ROOT / "workflow/report").glob("*.rst")}
    assert captions == {"report", *(f"figure_{n}" for n in FIGURES), *(f"table_{n}" for n in TABLES)}


def test_special_characters_of_tex_are_escaped(tmp_path):
    table = Table("50% of _x_ & y", "arm", [Column("a_b", "%")])
    table.add("x_1 & $2", "3% #4")
    table.add("x", "× −3")
    table.write(tmp_path / "t")
    text = (tmp_path / "t.tex").read_text(encoding="utf-8")
    assert r"x\_1 \& \$2 & 3\% \#4" in text and r"\caption{50\% of \_x\_ \& y}" in text and r"a\_b, \%" in text
    assert r"x & $\times$ $-$3" in text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colours", [style.LIGHT, style.DARK])
def test_colours_that_are_read_have_contrast(colours):
    """WCAG 2.2, 1.4.3: text on paper, and paper's colour as text on a bar."""
    paper = luminance(colours["paper"])
    for name in set(colours) - {"paper", "raised", "grid", "mark"}:
        low, high = sorted((paper, luminance(colours[name])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
    assert len(set(colours.values())) == len(colours), "the page tells them apart by their value"


@pytest.mark.parametrize("grey", np.linspace(0, 1, 9))
def test_numbers_on_a_map_have_contrast(grey):
    both = luminance(style.on((grey, grey, grey))), luminance("#" + f"{round(255 * grey):02x}" * 3)
    low, high = sorted(both)
    assert (high + 0.05) / (low + 0.05) >= 4.5


TWO = """
title: Values against text
seeds: [0, 1, 2]
student: pupil
data: {sources: []}
models:
  sums: {source: local, path: ROOT/math}
  pupil: {source: local, path: ROOT/student}
arms:
  plain: {role: control, label: text alone}
  with-values:
    {base: plain, role: experiment, label: "values, too", set: {teachers: [sums], loss: {values: {weight: 3.0}}}}
"""


def two_arms(root: Path) -> Inputs:
    """A configuration that shares no name with the shipped one, with finished results."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "two.yaml").write_text(TWO.replace("ROOT", str(ROOT / "config/embedded")), encoding="utf-8")
    source = "data.sources=[{kind: embedded, task: math, train: 40, validation: 9, test: 11}]"
    work = Inputs(load(root / "two.yaml", [source, "stats.resamples=1000"]), Paths(root / "results"))
    fake_results(work)
    return work


def test_a_page_of_two_arms(tmp_path):
    work = two_arms(tmp_path)
    write_report(work, tmp_path / "two.html", draw=True)
    page = Page((tmp_path / "two.html").read_text(encoding="utf-8"))
    question = (
        "Does with-values (values, too) need fewer bits per byte than plain (text alone) on unseen items of math?"
    )
    assert question in page.text
    first = page.text[page.text.index(question) : page.text.index("What was run", page.text.index(question))]
    assert (
        "with-values beats plain. 0.480 against 0.600 bits per byte: 0.80 × plain’s (95% interval 0.76 to 0.84)"
        in first
    )
    assert "6 cells: 0.05 hours in all, no GPU; peak memory 1.20 GB." in first
    assert page.tags.count("svg") == len(FIGURES) - 3, "no ladder, no fusion, no router"


# ---------------------------------------------------------------- parts of it
def test_every_arm_stands_beneath_its_base(work):
    rows = tables.ladder(Results(work)).rows
    depth = {row.name: row.depth for row in rows}
    names = list(depth)
    assert (depth["control"], depth["exp1"], depth["exp6"], depth["full"]) == (0, 1, 2, 3)
    for name, entry in work.config.arms.items():
        above = [n for n in names[: names.index(name)] if depth[n] < depth[name]]
        assert entry.base is None or above[-1] == entry.base
    cells = {row.name: [cell.text for cell in row.cells] for row in rows}
    assert cells["full"][2:] == ["0.84", "0.70 (0.67 to 0.73)", "–"], "no contrast with exp6: the ratio of the means"
    assert cells["misaligned"][3] == "1.20", "not tested against control: the ratio of the means"


def test_at_equal_time_the_fastest_has_done_all_and_half_the_speed_half(work):
    for seed in work.config.seeds:
        path = work.paths.cost("full", seed)
        write_json(path, json.loads(path.read_text()) | {"train_seconds": 61.0})
    rows = {row.name: [cell.text for cell in row.cells] for row in tables.equal_time(Results(work)).rows}
    assert rows["control"][:2] == ["30.5", "400"] and rows["control"][2] == rows["control"][3]
    assert rows["full"][:2] == ["61.0", "200"] and float(rows["full"][2]) > float(rows["full"][3])


def test_difficulty_is_that_of_the_student_before_training(work):
    found = Results(work).by_difficulty
    before = pd.read_parquet(work.paths.untrained)
    ranked = before[before.task == "math"].assign(per=lambda d: d.nll / d.bytes).sort_values("per").id.tolist()
    items = pd.read_parquet(work.paths.items("exp1", 1)).set_index("id")
    hardest = items.loc[ranked[7:]]  # of 11
    assert len(ranked) == 11
    assert found.loc[("math", "hardest"), ("exp1", 1)] == pytest.approx(
        hardest.nll.sum() / hardest.bytes.sum() / np.log(2)
    )


def test_the_cost_sheet_adds_up(work):
    for seed in work.config.seeds:
        path = work.paths.cost("full", seed)
        cost = json.loads(path.read_text())
        cost["provenance"]["device"] = "cuda:0"
        write_json(path, cost | {"wall_seconds": 7200.0, "gpu_seconds": 14400.0})
    folder = work.paths.benchmark("evaluate/full/seed0")
    folder.parent.mkdir(parents=True)
    pd.DataFrame({"s": [1800.0], "max_rss": [512.0]}).to_csv(folder, sep="\t", index=False)
    rows = {row.name: [cell.text for cell in row.cells] for row in tables.cost_sheet(Results(work)).rows}
    assert rows["full"] == ["3", "6.000", "12.000", "1.20", "0"]
    assert rows["evaluate"] == ["1", "0.500", "0.500", "–", ""], "a job beside cells on a GPU holds one"
    others = 42 * 30.5 / 3600
    assert rows["all"][:3] == ["46", f"{6.5 + others:.3f}", "12.500"]


def test_chosen_layers_are_those_of_the_most_similar_maps(work):
    rows = tables.chosen_layers(Results(work)).rows
    (one,) = [row for row in rows if row.cells[0].text == "exp3"]
    similarity = np.array(Results(work).layer_maps["math"]["similarity"]["keys"])
    taken = [int(n) for n in re.findall(r"(\d) \(", one.cells[2].text.split(";")[0])]
    assert set(taken) == set(np.argsort(similarity[0])[-2:])
    assert "2 most similar" in one.cells[1].text


def test_a_fit_that_loses_nothing_is_named_and_not_drawn(work):
    exp1 = work.dag.fit_id(work.dag.arms["exp1"])
    path = work.paths.fit_report(exp1)
    document = json.loads(path.read_text())
    document["explained_variance"] = {"math": {"keys": [1.0] * 3, "values": [0.99999] * 3}}
    write_json(path, document)
    results = Results(workspace(work.paths.root))
    assert results.lossless_fits == [exp1]
    drawn = words(figures.fit_quality(results))
    assert "exp2" in drawn and "exp1" not in drawn.replace("exp1,", "")


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
    assert text.count("<script") == 1
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
        "0.420 against 0.600 bits per byte: 0.70 × control’s (95% interval 0.67 to 0.73), "
        "−0.180 (−0.209 to −0.151) bits per byte, p 0.0028." in text
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
    (said,) = [line for line in Results(workspace(work.paths.root)).absent if line.startswith("Not tested")]
    assert f"; accuracy, {seeds} of 3 seeds: exp2 − control, full − control" in said and said in first
    assert "not tested against exp1: exp2 −0.012 and full −0.108" in first
    results = Results(workspace(work.paths.root))
    rows = [row for name in METRICS for row in tables.contrasts(results, name).rows if row.name == "full"]
    assert {tuple(row.cells[i].text for i in (2, 9, 7, 5)) for row in rows} == {("–", "–", "–", "not tested")}


def test_one_planned_seed_is_said_first(work):
    one = workspace(work.paths.root, "seeds=[0]")
    change(one, "contrasts.csv", lambda f: f.arm != "", n_seeds=1, **UNTESTED)
    assert any(line.startswith("One seed: ") for line in Results(one).absent)
    assert not [s for s in (wording.answer(Results(one)), *wording.conclusions(Results(one))) if s.tone == "good"]


def test_the_best_of_a_column_has_all_seeds(work):
    change(work, "arms.csv", lambda f: f.arm == "full", n_seeds=2)
    rows = tables.result_table(Results(workspace(work.paths.root)), ["bits_per_byte"]).rows
    assert [row.name for row in rows if row.cells[0].css == "best"] == ["exp5"]


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
    assert "against logit-kd" in words(figures.ladder_figure(Results(workspace(work.paths.root))))


def test_breach_of_fairness_comes_first(work):
    check = {"name": "tokens", "status": "allowed", "detail": "differ by 9%"}
    write_json(work.paths.root / "audit.json", {"checks": [check]})
    assert wording.conclusions(Results(workspace(work.paths.root)))[0].lead == "The comparison is not fair."
    text = Page(report(work)).text
    assert text.index("The comparison is not fair.") < text.index("What was run", text.index("full beats control."))


# ---------------------------------------------------------------- what is missing is shown
def test_missing_value_is_a_dash_with_its_reason(work):
    fake_stats(work, nan=("exp3", "tokens_to_control"))
    table = tables.result_table(Results(workspace(work.paths.root)), ["tokens_to_control"])
    cells, notes = {row.name: row.cells[0] for row in table.rows}, {table.letter(note): note for note in table.notes}
    assert cells["exp3"].text == wording.DASH
    assert "No seed reached" in notes[cells["exp3"].note]
    assert cells["exp2"].note == ""
    assert "Not trained." in notes[cells["untrained"].note]


def test_missing_contrast_is_not_a_conclusion(work):
    fake_stats(work, nan=("full", "bits_per_byte"))
    assert leads(work)["full against control: no result."] == "missing"
    results = Results(workspace(work.paths.root))
    assert (
        words(figures.effects(results)).count("no result")
        == words(figures.ladder_figure(results)).count("no result")
        == 1
    )


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
    write_report(workspace(work.paths.root), work.paths.report, draw=True)
    text = Page(work.paths.report.read_text(encoding="utf-8")).text
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
    found = Results(work).fusion_weights.set_index(["arm", "task"])
    assert found.loc[("full", "math"), ["math", "code"]].tolist() == pytest.approx([0.7, 0.3])
    assert found.loc[("full", "code"), ["math", "code"]].tolist() == pytest.approx([0.2, 0.8])
    assert "exp1" not in found.index.get_level_values("arm")


def test_changed_components_are_marked(work):
    changed = {r.name: [c.text for c in r.cells if c.css == "changed"] for r in tables.arms(Results(work)).rows}
    assert changed["exp2"] == ["elastic, frozen", "reconstruct"]
    assert changed["null-control"] == []
    assert changed["null-shuffled"] == ["math, code (shuffled)"]


def test_samples_are_the_first_items_whatever_came_out(work):
    shown = [s["record"].id for s in samples(Results(work))]
    records = [r for task in ("math", "code", "both") for r in work.records("test") if r.task == task]
    nth = {r.id: sum(q.task == r.task for q in records[:i]) for i, r in enumerate(records)}
    assert shown == [r.id for r in records if nth[r.id] < SAMPLES_PER_TASK]


def test_two_commits_are_both_shown(work):
    path = work.paths.cell("exp1", 0) / "cost.json"
    cost = json.loads(path.read_text())
    cost["provenance"]["git_commit"] = "def456"
    write_json(path, cost)
    found = {row.name: row.cells[0].text for row in tables.provenance(Results(work)).rows}
    assert found["git commit"] == "abc123 · def456"


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
    assert (page.count("extra thing furlongs") > 1) == (per == "item"), "in the table per task"
    folder = work.paths.stats if per == "item" else work.paths.costs
    table = pd.read_csv(folder / "contrasts.csv")
    assert set(table[table.metric == "extra"].verdict) == {"constant"}


def test_the_units_of_a_contrast(work):
    results = Results(workspace(work.paths.root))
    found = {m: wording.difference(results.contrasts["full", "control", m, "all"]) for m in METRICS}
    assert found["tokens_to_control"] == "−150 thousand tokens (3 seeds, not tested)"
    accuracy = results.contrasts["full", "control", "accuracy", "all"]
    constant = collect.Contrast(**vars(accuracy) | {"verdict": "constant"})
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
