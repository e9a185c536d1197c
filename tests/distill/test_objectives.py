"""What an arm adds to the loss, recomputed by hand from its aligned, projected and fused parts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import ARMS, build, config

from kvpipe.cache.capture import Recorder
from kvpipe.config import LossConfig, ScheduleConfig
from kvpipe.data.batches import collate
from kvpipe.distill.objectives import HeldTargets, ProjectedTargets, build_targets
from kvpipe.models.folders import load_model
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.objective import load_objective, teacher_losses, top_logits
from kvpipe.steps.projectors import fitted
from kvpipe.steps.train import prepare

EXAMPLES = np.array([3, 17, 8, 26, 0])
QUIET = lambda *_: None  # noqa: E731


class Given(Recorder):
    """A recorder that was handed its keys and values."""

    def __init__(self, kv, queries=None):
        self.given, self.given_queries = kv, queries

    def kv(self, positions=None):
        return self.given

    def queries(self, positions=None):
        return self.given_queries


@pytest.fixture(scope="module")
def work(tiny):
    """The shared experiment with every arm's artefacts, targets held in memory."""
    for arm in tiny.dag.arms:
        prepare(tiny, arm, log=QUIET)
    return tiny


def run(work, distiller, model=None, progress=(0, 10)):
    """One step on `EXAMPLES`: the step, the batch, the recorded keys and values as leaves, the logits."""
    batch = collate(work.student_encoding("train"), EXAMPLES, work.student_tokenizer.pad_token_id)
    model = work.student(0) if model is None else model
    with Recorder(model, hidden=distiller.needs_hidden) as recorder:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        kv = recorder.kv().detach()
        kv.keys.requires_grad_(), kv.values.requires_grad_()
        hidden = recorder.hidden_states().detach() if distiller.needs_hidden else None
        step = distiller(batch, logits, hidden, Given(kv, recorder.queries()), progress)
    return SimpleNamespace(step=step, batch=batch, kv=kv, logits=logits)


def divided(step):
    """What is watched of a batch in one part."""
    return {name: above / below for name, (above, below) in step.watch().items()}


def by_hand(own, target, mask, scaled):
    """Mean over unmasked positions of the squared residual, each layer in units of its target's deviation."""
    total = 0.0
    for layer in range(len(own)):
        shown = target[layer].transpose(1, 2)[mask]  # position head dim
        residual = own[layer].transpose(1, 2)[mask] - shown
        total += (residual / (shown.std(correction=0) if scaled else 1)).square().mean()
    return total / len(own)


# ---------------------------------------------------------------- targets
@pytest.mark.parametrize("arm", ["one", "own", "cka", "elastic"])
def test_held_targets_are_the_projected_ones(work, arm):
    arm = work.dag.arm(arm)
    teacher = work.aligned_teacher(arm, "alpha")
    projector = fitted(work, arm, [t.layers for t in (work.aligned_teacher(arm, n) for n in arm.teachers)])[0]
    held, live = (build_targets(teacher, projector, True, room) for room in (1e9, 0.0))
    assert isinstance(held, HeldTargets) and isinstance(live, ProjectedTargets)
    lengths = work.student_encoding("train").lengths[EXAMPLES]
    length = int(lengths.max()) + 3
    (a, a_mask), (b, b_mask) = held.fetch(EXAMPLES, length), live.fetch(EXAMPLES, length)
    assert torch.equal(a_mask, b_mask) and a_mask.any(1).all()
    inside = torch.arange(length)[None] < torch.from_numpy(lengths)[:, None]
    for one, two in ((a.keys, b.keys), (a.values, b.values)):
        one, two = one.permute(1, 3, 0, 2, 4), two.permute(1, 3, 0, 2, 4)
        torch.testing.assert_close(one[inside], two[inside], atol=1e-4, rtol=1e-4)
        assert not one[~inside].any()
    assert not a_mask[~inside].any()
    assert HeldTargets.bytes(teacher, projector) == (held.rows.numel() - held.rows[0].numel()) * 4


def test_a_trainable_projector_is_never_held(work):
    arm = work.dag.arm("joint")
    assert all(isinstance(t, ProjectedTargets) for t in load_objective(work, arm, 0).targets)
    assert all(isinstance(t, HeldTargets) for t in load_objective(work, work.dag.arm("two"), 0).targets)


# ---------------------------------------------------------------- keys and values
@pytest.mark.parametrize("scaled", [True, False])
def test_terms_are_the_loss_by_hand(work, scaled):
    loss = LossConfig(kind="kv", lambda_k=0.5, lambda_v=3.0, scale="std" if scaled else "none")
    arm = work.dag.arm("task").model_copy(update={"loss": loss})
    distiller = load_objective(work, arm, 0)
    found = run(work, distiller)
    fetched = [t.fetch(EXAMPLES, found.batch.input_ids.shape[1]) for t in distiller.targets]
    present = torch.stack([mask for _, mask in fetched]).float()
    table = {"math": [0.7, 0.3], "code": [0.3, 0.7]}
    tasks = [work.records("train")[e].task for e in EXAMPLES]
    assert len(set(tasks)) == 2
    weight = torch.tensor([table[task] for task in tasks]).T[:, :, None] * present
    weight = weight / weight.sum(0).clamp(min=1e-9)
    mask = found.batch.mask & (present.sum(0) > 0)
    for name, own, kind, factor in (("k", found.kv.keys, "keys", 0.5), ("v", found.kv.values, "values", 3.0)):
        target = sum(w[None, :, None, :, None] * getattr(kv, kind) for w, (kv, _) in zip(weight, fetched, strict=True))
        term = found.step.terms[name]
        assert term.weight == factor
        torch.testing.assert_close(term.value, by_hand(own, target, mask, scaled), atol=1e-4, rtol=1e-4)
    watched = divided(found.step)
    assert watched["masked_share"] == pytest.approx(1 - (mask.sum() / found.batch.mask.sum()).item())
    for task in table:
        shares = [watched[f"weight/{task}/{name}"] for name in ("alpha", "beta")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["one", "attention", "select", "own", "shuffled", "position", "cka", "elastic"])
def test_masked_positions_contribute_nothing(work, name):
    distiller = load_objective(work, work.dag.arm(name), 0)
    found = run(work, distiller)
    present = torch.stack([t.fetch(EXAMPLES, found.batch.input_ids.shape[1])[1] for t in distiller.targets]).any(0)
    counted = found.batch.mask & present
    assert counted.any(1).all() and not counted.all()
    for term, own in (("k", found.kv.keys), ("v", found.kv.values)):
        (gradient,) = torch.autograd.grad(found.step.terms[term].value, own)
        touched = (gradient != 0).any(0).any(1).any(-1)
        assert torch.equal(touched, counted)


def test_a_student_that_has_the_targets_has_no_loss(work):
    distiller = load_objective(work, work.dag.arm("one"), 0)
    batch = collate(work.student_encoding("train"), EXAMPLES, 0)
    kv, _ = distiller.targets[0].fetch(EXAMPLES, batch.input_ids.shape[1])
    step = distiller(batch, torch.zeros(5, 1, 1), None, Given(kv), (0, 10))
    assert all(term.value == 0 for term in step.terms.values())


def test_skipped_positions_and_layers_and_the_schedule(work):
    schedule = ScheduleConfig(kind="linear", final=0.5)
    loss = LossConfig(kind="kv", lambda_k=0, lambda_v=2.0, skip_sink=4, layers=[2, 0], schedule=schedule)
    distiller = load_objective(work, work.dag.arm("one").model_copy(update={"loss": loss}), 0)
    found = run(work, distiller, progress=(5, 10))
    assert set(found.step.terms) == {"v"}
    assert found.step.terms["v"].weight == pytest.approx(1.5)
    (gradient,) = torch.autograd.grad(found.step.terms["v"].value, found.kv.values)
    assert not gradient[1].any() and not gradient[:, :, :, :4].any()
    assert gradient[0].any() and gradient[2].any()


def test_gradients_reach_trainable_projectors_only(work):
    frozen = load_objective(work, work.dag.arm("two").model_copy(), 0)
    assert not [p for p in frozen.parameters() if p.requires_grad]
    teacher = work.aligned_teacher(work.dag.arm("one"), "alpha")
    (projector,) = fitted(work, work.dag.arm("one"), [teacher.layers])
    not_held = build_targets(teacher, projector, True, 0.0)
    assert list(not_held.parameters()) and not any(p.requires_grad for p in not_held.parameters())
    joint = load_objective(work, work.dag.arm("joint"), 0)
    found = run(work, joint)
    (found.step.terms["k"].value + found.step.terms["v"].value).backward()
    gradients = [p.grad for p in joint.parameters() if p.requires_grad]
    assert len(gradients) == 2 * (1 + 2 * 3) and all(g is not None and g.any() for g in gradients)


def test_a_shuffled_arm_reads_another_example_of_the_task_by_the_seed(work):
    arm = work.dag.arm("shuffled")
    first, second = (work.aligned_teacher(arm, "alpha", seed).time.source for seed in (0, 1))
    tasks = np.array([record.task for record in work.records("train")])
    for source in (first, second):
        assert (source != np.arange(len(source))).all() and (tasks[source] == tasks).all()
    assert (first != second).any()
    own, shuffled = (
        run(work, load_objective(work, work.dag.arm(name), 0)).step.terms["k"].value for name in ("two", "shuffled")
    )
    assert own != shuffled


def test_selection_follows_the_teachers_losses(work):
    arm = work.dag.arm("select")
    losses = teacher_losses(work, arm)
    for row, name in enumerate(arm.teachers):
        encoding = work.encoding(name, "train", "student")
        model = load_model(work.paths.model(name))
        for example in (0, 20):
            ids = torch.from_numpy(encoding.ids[encoding.rows(example)])[None]
            with torch.no_grad():
                expected = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
            assert losses[row, example] == pytest.approx(expected.item(), rel=1e-3)
    watched = divided(run(work, load_objective(work, arm, 0)).step)
    best = losses[:, EXAMPLES].argmin(0)
    tasks = [work.records("train")[e].task for e in EXAMPLES]
    for task in set(tasks):
        mine = [int(b) for b, t in zip(best, tasks, strict=True) if t == task]
        share = watched[f"weight/{task}/alpha"]
        # a few positions have a target from one teacher alone
        assert share == pytest.approx(1 - np.mean(mine), abs=0.05) if len(set(mine)) == 1 else 0 < share < 1


def test_control_adds_nothing(work):
    assert load_objective(work, work.dag.arm("control"), 0) is None


# ---------------------------------------------------------------- baselines
@pytest.fixture(scope="module")
def selfsame(tmp_path_factory):
    """A student that *is* the teacher, which keeps its whole next-token distribution."""
    folder = tmp_path_factory.mktemp("selfsame")
    teacher = {"source": "local", "path": str(folder / "teachers" / "alpha")}
    arms = {
        "control": ARMS["control"],
        "logit": {"base": "control", "set": {"teachers": ["alpha"], "loss.kind": "logit_kd"}},
        "relation": {
            "base": "control",
            "set": {"teachers": ["alpha"], "loss": {"kind": "relation", "relation_heads": 2}},
        },
    }
    build(folder)
    vocabulary = load_model(folder / "teachers" / "alpha").config.vocab_size
    overrides = {"models.student": teacher, "arms": arms, "store.top_logits": vocabulary, "store.dtype": "fp16"}
    work = Inputs(config(folder, overrides), build(folder / "again", overrides).paths)
    prepare(work, "relation", log=QUIET)
    prepare(work, "logit", log=QUIET)
    return work


@pytest.mark.parametrize("name", ["logit", "relation"])
def test_a_model_has_nothing_to_learn_from_itself(selfsame, name):
    distiller = load_objective(selfsame, selfsame.dag.arm(name), 0)
    own = run(selfsame, distiller, load_model(selfsame.paths.model("student")))
    other = run(selfsame, distiller, load_model(selfsame.paths.model("student")).apply(_jitter))
    assert own.step.terms and other.step.terms.keys() == own.step.terms.keys()
    for term in own.step.terms:
        assert own.step.terms[term].value.abs() < 1e-3 < 0.05 * other.step.terms[term].value


def _jitter(module):
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean())


def test_logits_are_compared_where_both_have_read_the_same_bytes(work):
    src, dst = work.encoding("beta", "train", "student"), work.student_encoding("train")
    entry = top_logits(work, "beta")
    for example in (2, 19):
        ends = set(src.spans[src.rows(example)][:, 1].tolist())
        rows = dst.spans[dst.rows(example)]
        expected = [stop in ends and stop > start for start, stop in rows.tolist()]
        assert entry.mask[dst.rows(example)].tolist() == expected
    ids, logprobs, mask = entry.padded(EXAMPLES, 60)
    assert ids.shape == logprobs.shape == (5, 60, 5) and mask.any(1).all()
    assert (ids[~mask] == -1).all() and (logprobs[mask] <= 0).all()
    assert (logprobs[mask].exp().sum(-1) <= 1 + 1e-2).all()


def test_logit_weights_follow_the_task_table(work):
    """The term is linear in the table: each teacher alone, weighed."""
    arm = work.dag.arm("logit")
    values = []
    for row in ([0.6, 0.4], [1.0, 0.0], [0.0, 1.0]):
        fuse = arm.fuse.model_copy(update={"weights": {"default": row}})
        distiller = load_objective(work, arm.model_copy(update={"fuse": fuse}), 0)
        values.append(run(work, distiller).step.terms["logit"].value)
    torch.testing.assert_close(values[0], 0.6 * values[1] + 0.4 * values[2])
    assert values[1] != values[2]
