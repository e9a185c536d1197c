"""Students that start from their teacher's cache: a twin loses nothing, and the numbers are those of one forward."""

import numpy as np
import pytest
import torch
from tiny import build, config

from kvpipe.config import ConfigError
from kvpipe.data.encoding import encode_records
from kvpipe.evaluate.score import evaluate_model
from kvpipe.experiment.paths import Paths
from kvpipe.steps.cells import KeptCells, report_cells, run_cells
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import make
from kvpipe.steps.swap import swapped_nll

MATCH = {"teachers": ["beta"], "layer.kind": "kept", "fit": {"method": "identity"}, "loss": {"keys": {}, "values": {}}}
FOREIGN = {"teachers": ["alpha"], "layer": {"kind": "proportional"}, "fit": {"method": "ridge", "examples": 20}}
ARMS = {
    "control": {},
    "match": {"base": "control", "role": "experiment", "set": MATCH},
    "foreign": {"base": "match", "set": FOREIGN},
}
ONE = "must match keys and values of one teacher"


def overrides(kept, swap):
    entry = {"source": "pruned", "of": "beta", "layers": kept}
    allowed = {"audit.allow": ["tokens", "seeds"]}
    return {"models.student": entry, "arms": ARMS, "evaluate.cache_swap": swap, "evaluate.scorer": "none"} | allowed


def experiment(folder, kept, swap) -> Inputs:
    work = build(folder, overrides(kept, swap))
    make(work, [work.paths.projector(work.dag.fit_id(work.dag.arm(swap)))], log=lambda *_: None)
    return work


def own(work, student, records):
    settings = work.config.evaluate
    return evaluate_model(student, work.student_tokenizer, records, work.config.data.template, settings).nll.to_numpy()


def test_a_twin_goes_on_from_its_teachers_cache_as_from_its_own(tmp_path):
    work = experiment(tmp_path, [0, 1, 2, 3, 4], "match")
    student, records = work.student(0), work.records("test")
    found, expected = swapped_nll(work, "match", student, records), own(work, student, records)
    np.testing.assert_allclose(found["nll_swap"], expected, rtol=1e-4)
    # the ridge finds the identity, but for its penalty and the store's rounding
    np.testing.assert_allclose(found["nll_swap_ridge"], expected, rtol=0.2)
    assert np.abs(found["nll_no_prompt"] / expected - 1).max() > 0.01
    # without the prompt: the text from its last token on, alone
    encoding = encode_records(records, work.student_tokenizer, work.config.data.template)
    first = int(encoding.segments[0, 0, 1]) - 1
    ids = torch.from_numpy(encoding.ids[encoding.rows(0)])[first:][None]
    with torch.no_grad():
        logp = student(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    counted = np.diff(encoding.spans[encoding.rows(0)], axis=1)[first + 1 :, 0] > 0
    assert found["nll_no_prompt"][0] == pytest.approx(-float(logp[counted].sum()), rel=1e-4)


def test_a_student_of_fewer_layers_and_a_teacher_of_another_tokenizer(tmp_path):
    work = experiment(tmp_path, [0, 2, 3], "foreign")
    student, records = work.student(0), work.records("test")
    found = swapped_nll(work, "foreign", student, records)
    assert all(np.isfinite(values).all() and (values > 0).all() for values in found.values())
    # another teacher's cache is another start, and the map onto the student's own loses less of it
    with torch.no_grad():
        work.teacher_model("alpha").model.embed_tokens.weight.mul_(-1)
    assert np.abs(swapped_nll(work, "foreign", student, records)["nll_swap"] - found["nll_swap"]).min() > 0


def test_the_metric_is_in_scores_statistics_and_page(tmp_path):
    work = build(tmp_path, overrides([0, 2, 3], "match"))
    kept = KeptCells(work, tmp_path / "kept")
    assert (
        run_cells(kept, [(arm, seed) for arm in ("control", "match") for seed in (0, 1)], True, None, lambda *_: None)
        == 0
    )
    shown = config(tmp_path, overrides([0, 2, 3], "match"))
    other = Inputs(shown, Paths(tmp_path / "other"))
    report_cells(KeptCells(other, kept.folder), tmp_path / "page.html", lambda *_: None)
    table = (other.paths.stats / "contrasts.csv").read_text()
    assert all(f"match,control,{name}," in table for name in ("cache_swap", "cache_swap_ridge", "no_prompt"))
    assert "from the teacher&#39;s cache" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("swap", "said"),
    [("control", ONE), ("two", ONE), ("logit", ONE), ("own", ONE), ("onne", "no arm is named 'onne'.*one")],
)
def test_an_arm_that_cannot_translate_is_refused(tmp_path, swap, said):
    with pytest.raises(ConfigError, match=rf"evaluate\.cache_swap: .*{said}"):
        config(tmp_path, {"evaluate.cache_swap": swap})
