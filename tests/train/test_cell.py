"""What a cell is given of its own: the arm's learning rate, and weights that are not trained."""

import pytest
import torch
from tiny import build

from kvpipe.config import ConfigError
from kvpipe.experiment import device
from kvpipe.models.folders import load_model
from kvpipe.stats.scores import read_history
from kvpipe.steps.train import load_cell, make_cell

ARM = {"base": "control", "set": {"learning_rate_factor": 2.5}}


def test_an_arm_trains_at_its_own_rate_and_what_is_frozen_stays(tmp_path):
    work = build(tmp_path, {"arms.faster": ARM, "train.frozen": ["embed"], "train.log_every": 1})
    before = work.student(0).state_dict()
    make_cell(work, "faster", 0, log=lambda *_: None)
    steps, _ = read_history(work.paths, "faster", 0)
    assert steps.learning_rate.max() == pytest.approx(2.5 * work.config.train.learning_rate)
    after = load_model(work.paths.student("faster", 0)).state_dict()
    same = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    assert {name for name in after if "embed" in name} <= same
    assert not {name for name in after if "proj" in name} & same


@pytest.mark.parametrize(
    ("frozen", "said"), [(["embde"], "no weight of the student has 'embde'"), ([""], "leaves nothing")]
)
def test_what_cannot_be_frozen_is_refused(tmp_path, frozen, said):
    work = build(tmp_path, {"train.frozen": frozen})
    with pytest.raises(ConfigError, match=rf"train\.frozen: .*{said}"):
        load_cell(work, "control", 0, log=lambda *_: None)


def test_auto_is_resolved_before_anything_is_trained_and_a_checkpoint_of_the_other_is_refused(tmp_path, monkeypatch):
    work = build(tmp_path, {"train.precision": "auto"})
    made = []
    for native, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(device, "cpu_has_bf16", lambda n=native: n)
        cell = load_cell(work, "control", 0, log=lambda *_: None)
        assert cell.config.precision == precision
        made.append(cell.made_from)
    assert made[0] != made[1]
