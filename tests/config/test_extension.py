"""An extension is one file: a fusion, a projector, a loss term and a metric of a stranger's run through a whole cell."""

import json
import sys

import pandas as pd
import pytest
from tiny import ARMS, build

from kvpipe.config import FUSIONS, PROJECTORS, TERMS, ConfigError, parse
from kvpipe.experiment.plan import Dag
from kvpipe.report.render import write_report
from kvpipe.stats import tables
from kvpipe.stats.metrics import ITEM_METRICS, METRICS
from kvpipe.steps.evaluate import score_folder, score_untrained
from kvpipe.steps.train import make_cell

FILE = '''
"""Toys."""
from typing import ClassVar, Literal
import torch
from kvpipe import FUSIONS, PROJECTORS, TERMS, Fusion, Term
from kvpipe.config import FusionSettings, ProjectorSettings, TermSettings
from kvpipe.distill.projectors import LinearProjector
from kvpipe.stats.metrics import Metric, register


@FUSIONS.register
class SoftSelectConfig(FusionSettings):
    """Softmax of minus the loss."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_losses"})
    kind: Literal["soft_select"] = "soft_select"
    temperature: float = 10.0


@FUSIONS.built_from(SoftSelectConfig)
class SoftSelect(Fusion):
    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    @classmethod
    def of(cls, settings, teachers, hidden_size):
        return cls(settings.temperature)

    def preference(self, targets, *, teacher_losses=None, **context):
        return -teacher_losses[:, None, :, None, None] / self.temperature


@PROJECTORS.register
class ScaledConfig(ProjectorSettings):
    """A linear map and a learned scale."""

    kind: Literal["scaled"] = "scaled"


@PROJECTORS.built_from(ScaledConfig)
class Scaled(LinearProjector):
    def __init__(self, geometry, plan):
        super().__init__(geometry, plan)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, keys, values):
        out = super().forward(keys, values)
        return type(out)(out.keys * self.scale, out.values * self.scale)


@TERMS.register
class NormConfig(TermSettings):
    """Size of the student's values."""

    needs: ClassVar[frozenset[str]] = frozenset({"own_kv"})
    kind: Literal["norm"] = "norm"


@TERMS.built_from(NormConfig)
class Norm(Term):
    def forward(self, batch, said, whole, student):
        size = student.kv.values.square().mean((0, 2, 4))
        return (size * batch.mask).sum() / whole[0]


register(Metric("bytes_each", "bytes", "", "bytes", "item", lambda d: d.bytes.astype(float), "log"))
'''


@pytest.fixture
def toys(tmp_path):
    """The file, and its entries taken out again afterwards."""
    file = tmp_path / "toys.py"
    file.write_text(FILE, encoding="utf-8")
    yield file
    for kinds, name in ((FUSIONS, "soft_select"), (PROJECTORS, "scaled"), (TERMS, "norm")):
        kinds.settings.pop(name, None)
    for name in [name for name in sys.modules if name.startswith("kvpipe_extension_toys")]:
        del sys.modules[name]
    for table in (METRICS, ITEM_METRICS):
        table.pop("bytes_each", None)


def test_toys_run_stored_and_live_through_statistics_and_report(toys, tmp_path):
    arm = {
        "base": "two",
        "role": "experiment",
        "set": {
            "fuse": {"kind": "soft_select", "temperature": 5},
            "projector": {"kind": "scaled", "mode": "joint"},
            "loss.norm": {"weight": 0.1},
        },
    }
    arms = {name: ARMS[name] for name in ("control", "one", "two")} | {"toys": arm}
    given = {"arms": arms, "extensions": [str(toys)], "seeds": [0, 1], "stats.headline": "toys"}
    found = {}
    for mode in ("stored", "live"):
        work = build(tmp_path / mode, given | {"store.mode": mode})
        for name in ("toys", "control", "one", "two") if mode == "stored" else ("toys",):
            for seed in (0, 1) if mode == "stored" else (0,):
                make_cell(work, name, seed, None, None, False, lambda *_: None)
        lines = (work.paths.cell("toys", 0) / "history.jsonl").read_text().splitlines()
        found[mode] = [line for line in map(json.loads, lines) if "norm" in line]
        if mode == "stored":
            stored = work
    for one, two in zip(found["stored"], found["live"], strict=True):
        assert one["norm"] > 0 and one["lambda_norm"] == 0.1
        for key in ("cross_entropy", "keys", "values", "norm"):
            assert two[key] == pytest.approx(one[key], rel=2e-2), key
    for name in arms:
        for seed in (0, 1):
            score_folder(stored, stored.paths.student(name, seed), "test", stored.paths.items(name, seed))
        tables.write_arm_table(stored.dag, stored.paths, name)
    score_untrained(stored, stored.paths.untrained)
    tables.write_stats(stored.dag, stored.paths, stored.paths.untrained)
    assert "bytes_each" in set(pd.read_csv(stored.paths.tables[0]).metric)
    write_report(stored.config, stored.paths, stored.paths.report)
    page = stored.paths.report.read_text(encoding="utf-8")
    assert "soft_select" in page and "0.1 norm" in page and "scaled" in page


def test_an_extensions_code_reaches_the_steps_that_it_decides(toys, tmp_path):
    from tiny import config

    given = {"extensions": [str(toys)]}
    mine = config(tmp_path, given)
    before = Dag(mine).extensions
    toys.write_text(FILE + "\n# changed\n", encoding="utf-8")
    after = Dag(mine).extensions
    assert before != after and Dag(config(tmp_path)).extensions == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "is no Python file"), ("import nowhere_at_all", "ModuleNotFoundError"), ("1 / 0", "ZeroDivisionError")],
)
def test_an_extension_that_cannot_be_imported_is_named(tmp_path, text, said):
    from tiny import values

    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=rf"extensions: .*broken\.py .*{said}"):
        parse(values(tmp_path), {"extensions": [str(file)]})


def test_a_name_that_is_taken_is_refused(tmp_path):
    from tiny import values

    file = tmp_path / "taken.py"
    file.write_text(
        "from typing import Literal\nfrom kvpipe import FUSIONS\nfrom kvpipe.config import FusionSettings\n"
        "@FUSIONS.register\nclass Mine(FusionSettings):\n    'Mine.'\n    kind: Literal['mean'] = 'mean'\n"
    )
    with pytest.raises(ConfigError, match=r"fusion 'mean' is taken by kvpipe\.config\.fusions\.MeanFusionConfig"):
        parse(values(tmp_path), {"extensions": [str(file)]})
