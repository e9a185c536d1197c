"""What a cell does on an accelerator: `python -m pytest -m gpu` on a machine that has one.

Every law is run on the CPU too (`make test`), so that nobody needs a GPU to see whether a test itself still holds.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import build, own_accelerator_state

from kvpipe.data.records import read_records
from kvpipe.evaluate.score import evaluate
from kvpipe.steps.train import prepare, train_cell

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")],
    ),
]


def quiet(*_):
    pass


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def train(work, folder, log=quiet):
    """A cell of the arm `two`; accelerate keeps device and precision for a whole process, which here has several cells."""
    with own_accelerator_state():
        train_cell(work, "two", 0, folder, folder.with_name(f"{folder.name}.checkpoints"), log=log)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_whole_path_of_a_cell(tmp_path, device, precision):
    """Teacher KV, layer map, fit, training, export and scoring on the device; the same history as on the CPU but for rounding."""
    histories = {}
    for where in {"cpu", device}:
        work = build(tmp_path / where, {"train.device": where, "train.precision": precision, "train.log_every": 1})
        prepare(work, "two", log=quiet)
        train(work, tmp_path / where / "out")
        lines = (tmp_path / where / "out" / "history.jsonl").read_text().splitlines()
        histories[where] = [line["validation_loss"] for line in map(json.loads, lines) if "validation_loss" in line]
    assert all(map(math.isfinite, histories[device]))
    assert histories[device] == pytest.approx(histories["cpu"], rel=1e-3 if precision == "fp32" else 5e-2)
    records = read_records(work.paths.data("test"))
    model, settings = tmp_path / device / "out" / "model", work.config.evaluate
    tables = [evaluate(model, records, work.config.data.template, settings, where) for where in ("cpu", device)]
    assert tables[1].nll.to_numpy() == pytest.approx(tables[0].nll.to_numpy(), rel=1e-3)


def test_a_run_that_goes_on_from_a_checkpoint_gives_the_same_bits(tmp_path, device):
    work = build(tmp_path, {"train.device": device, "train.checkpoint_every": 2})
    prepare(work, "two", log=quiet)

    def interrupt(line: str) -> None:
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    train(work, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(work, tmp_path / "interrupted", interrupt)
    names = sorted(path.name for path in (tmp_path / "interrupted.checkpoints").glob("step-*"))
    assert names == ["step-00000001", "step-00000002"]
    train(work, tmp_path / "interrupted")
    whole, resumed = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "interrupted"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
