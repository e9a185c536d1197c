"""What arms ask of their models that these do not have: one line each, from the doctor and before any teacher pass."""

import pytest
from tiny import build, config

from kvpipe.config import ConfigError
from kvpipe.doctor import Workload
from kvpipe.doctor.settings import check_arms
from kvpipe.experiment.misfits import misfits
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.sizes import shape
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.teacher_kv import make_shard
from kvpipe.steps.train import prepare

# tiny: the student has 3 layers, alpha 4 (vocabulary 330), beta 5 (2 heads of 14, vocabulary 340)
CASES = {
    "a student layer too many": ({"loss.keys.layers": [0, 3]}, "loss.keys.layers: [3] not in the student"),
    "one number too few": ({"layer": {"kind": "list", "layers": [0, 1]}}, "layer.layers: 2 numbers; expected 3"),
    "no such layer": ({"layer": {"kind": "list", "layers": [0, 1, 4]}}, "layer.layers: 4 is not in the teacher alpha"),
    "another shape": ({"fit.method": "identity"}, "fit.method: identity: 3 heads of 8 in alpha, 2 of 6 in student"),
    "relation heads": ({"loss": {"relations": {"heads": 5}}}, "loss.relations.heads: 5 does not divide"),
}
TOPS = ({"store.top_logits": 331}, "store.top_logits: 331 next tokens of alpha, whose vocabulary has 330")
MISFITS = [({"arms.mine": {"base": "one", "set": s}}, f"arms.mine.set.{said}") for s, said in CASES.values()] + [TOPS]
each = pytest.mark.parametrize(("overrides", "said"), MISFITS, ids=[*CASES, "more than the vocabulary"])


def mine(**settings) -> dict:
    """One arm more, `one` with some settings changed (`__` for a dot)."""
    return {"arms.mine": {"base": "one", "set": {k.replace("__", "."): v for k, v in settings.items()}}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data and models made; nothing else."""
    folder = tmp_path_factory.mktemp("misfits")
    build(folder)
    return folder


def workspace(place, overrides) -> Inputs:
    return Inputs(config(place, overrides), Paths(place / "results"))


@each
def test_what_does_not_fit_is_refused_before_any_teacher_reads(place, overrides, said):
    work = workspace(place, mine() | overrides)
    for step in (lambda: prepare(work, "mine"), lambda: make_shard(work, "alpha", "student", "0")):
        with pytest.raises(ConfigError) as caught:
            step()
        assert said in str(caught.value)
    assert not (place / "results" / "teacher_kv").exists(), "nothing was computed"


@each
def test_the_doctor_finds_it_with_and_without_models_made(place, tmp_path, overrides, said):
    for paths in (Paths(place / "results"), Paths(tmp_path / "new")):
        found = [*check_arms(Workload(config(place, overrides), paths))]
        assert [f.status for f in found] == ["would fail"] * len(found)
        assert any(f.detail.startswith(said) for f in found), found


def test_what_fits_passes(place):
    assert [f.status for f in check_arms(Workload(config(place), Paths(place / "results")))] == ["ok"]
    layers = {"kind": "list", "layers": [3, 0, 1]}
    fitting = mine(loss__keys__layers=[2, 0], layer=layers, loss__keys__skip_sink=7) | {"store.top_logits": 330}
    workspace(place, fitting).check(["mine", "two", "control", "logit", "relation"])


def test_models_that_are_not_known_are_not_judged(place):
    dag = Dag(config(place, mine(loss__keys__layers=[9])))
    assert misfits(dag, {}) == []
    student = shape({"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4})
    assert [line.split(":")[0] for line in misfits(dag, {"student": student}, ["mine"])] == [
        "arms.mine.set.loss.keys.layers"
    ]


def test_first_positions_that_are_left_out_leave_some(place):
    longest = int(workspace(place, {}).student_encoding("train").lengths.max())
    workspace(place, mine(loss__keys__skip_sink=longest - 1)).check(["mine"])
    with pytest.raises(
        ConfigError, match=rf"arms\.mine\.set\.loss\.keys\.skip_sink: {longest} leaves nothing.*{longest} tokens"
    ):
        workspace(place, mine(loss__keys__skip_sink=longest)).check(["mine"])
