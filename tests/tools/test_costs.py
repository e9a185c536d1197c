"""The cost curves: a small grid is measured once and drawn."""

import csv

import costs
import peaks
import pytest
import sized
from costs import draw, fill, grid, read
from sized import TINY
from transformers import AutoConfig

from kvpipe.config import TokenizerRecipe
from kvpipe.models.tokenizers import train_tokenizer


def test_a_small_grid_is_measured_once_and_drawn(tmp_path, monkeypatch):
    path, points = tmp_path / "costs.csv", [point for point in grid(small=True) if point.curve in ("teachers", "store")]
    fill(path, points)
    lines = read(path)
    assert [(line["curve"], int(line["x"]), line["arm"]) for line in lines] == [p[:3] for p in points]
    assert all(float(line["seconds"]) > 0 and float(line["peak_bytes"]) > 1e8 for line in lines)
    sizes = {(line["x"], line["arm"]): float(line["file_bytes"]) for line in lines if line["curve"] == "store"}
    assert sizes["1000", "bf16"] > 1.5 * sizes["500", "bf16"]
    assert sizes["1000", "int8"] < sizes["1000", "bf16"]
    monkeypatch.setattr(costs, "measured", lambda *_: pytest.fail("a point that is there was measured again"))
    fill(path, points)
    draw(lines, tmp_path / "a.svg")
    draw(lines, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def only_sizes(folder, architecture, seed):
    """A model folder without weights."""
    tokenizer = train_tokenizer(TokenizerRecipe(kind="byte_bpe", vocab_size=260, split_digits=False), ["a b"])
    tokenizer.save_pretrained(folder)
    options = dict(architecture)
    AutoConfig.for_model(options.pop("model_type"), **options).save_pretrained(folder)


def test_what_is_announced_now_is_within_a_quarter_of_what_was_measured(tmp_path, monkeypatch):
    """The formulas as they are, against the committed peaks at the sizes of real models."""
    monkeypatch.setattr(sized, "save", only_sizes)
    lines = list(csv.DictReader((peaks.OUT / "peaks.csv").open(newline="", encoding="utf-8")))
    assert {line["geometry"] for line in lines} == set(peaks.GEOMETRIES)
    for name, pair in peaks.GEOMETRIES.items():
        peaks.experiment(tmp_path / name, *pair)
        said = peaks.announced(tmp_path / name)
        for line in (line for line in lines if line["geometry"] == name):
            assert float(line["measured"]) == pytest.approx(said[line["rule"]], rel=0.25), line


@pytest.mark.slow
def test_memory_is_announced_for_a_small_geometry(tmp_path):
    """The program itself, and what the doctor says of an experiment that it measures."""
    small = {**TINY, "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024}
    for line in peaks.fill(tmp_path / "peaks.csv", {"small": (small, small)}):
        assert float(line["measured"]) == pytest.approx(float(line["announced"]), rel=0.25), line
