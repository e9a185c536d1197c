"""`make bench-gpu` at toy size on a CPU: every figure is there, and is one."""

import csv
import math

import pytest
import torch
from bench_gpu import LLAMA3, QWEN2, REAL, REHEARSAL, TINYLLAMA, forward_flops, run_bench
from transformers import AutoConfig, AutoModelForCausalLM


def test_the_rehearsal_gives_every_figure(tmp_path, own_accelerator):
    lines = run_bench(REHEARSAL, torch.device("cpu"), tmp_path / "gpu.csv")
    of_teacher = {"bare forward", "utilisation", "teacher pass", "teacher pass against bare forward"}
    of_teacher |= {"store written", "store against disk", "peak memory"}
    of_student = {"training", "utilisation", "peak memory"}
    found = {(line["model"], line["tokens"], line["what"]) for line in lines[1:]}
    expected = {(name, n, what) for name in REHEARSAL.teachers for n in REHEARSAL.lengths for what in of_teacher}
    expected |= {
        (f"student, {a}", n, what) for a in ("control", "full") for n in REHEARSAL.lengths for what in of_student
    }
    expected |= {("student, full", n, "full against control, time") for n in REHEARSAL.lengths}
    assert found == expected
    assert all(math.isfinite(line["value"]) and line["value"] > 0 for line in lines)
    with (tmp_path / "gpu.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(lines)


@pytest.mark.parametrize(
    ("architecture", "parameters"), [(QWEN2, 7_615_616_512), (LLAMA3, 8_030_261_248), (TINYLLAMA, 1_100_048_384)]
)
def test_the_models_have_the_sizes_of_the_real_ones(architecture, parameters):
    options = dict(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    assert model.num_parameters() == parameters
    embedding = architecture["vocab_size"] * architecture["hidden_size"]
    # short texts: two operations for each weight that multiplies
    assert forward_flops(architecture, parameters, 1) == pytest.approx(2 * (parameters - embedding), rel=1e-3)
    assert REAL.lengths == (2048, 32768)


@pytest.mark.gpu
def test_the_rehearsal_on_a_gpu(tmp_path):
    lines = run_bench(REHEARSAL, torch.device("cuda"), tmp_path / "gpu.csv")
    assert all(math.isfinite(line["value"]) and line["value"] > 0 for line in lines)
