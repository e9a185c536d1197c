"""An arm's loss, recomputed by hand from its aligned, projected and fused parts."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import ARMS, MORE_ARMS, build, config

from kvpipe.align.layer import proportional_map
from kvpipe.cache.attention import attention_outputs
from kvpipe.cache.capture import Recorder
from kvpipe.cache.kv import KV
from kvpipe.config import FUSIONS, TERMS, ScheduleConfig
from kvpipe.data.batches import collate
from kvpipe.distill.losses import logit_kd_loss
from kvpipe.distill.targets import HeldTargets, ProjectedTargets, build_targets
from kvpipe.distill.terms import Student
from kvpipe.models.folders import load_model
from kvpipe.models.head import Head, final_states
from kvpipe.models.likelihood import token_nll
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.objective import load_objective, top_logits
from kvpipe.steps.projectors import fitted
from kvpipe.steps.train import prepare

EXAMPLES = np.array([3, 17, 8, 26, 0])
TABLE = {"math": [0.7, 0.3], "code": [0.3, 0.7]}
QUIET = lambda *_: None  # noqa: E731


class Given(Recorder):
    """A recorder that was handed its keys and values."""

    def __init__(self, kv, recorder=None):
        self.given, self.seen = kv, recorder

    def keys(self, positions=None):
        return self.given.keys

    def values(self):
        return self.given.values

    def queries(self, positions=None):
        return self.seen.queries()

    def hidden_states(self):
        return self.seen.hidden_states().detach()

    @property
    def ropes(self):
        return self.seen.ropes


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """An experiment with every arm's artefacts, targets held in memory."""
    work = build(tmp_path_factory.mktemp("objective"), {"arms": ARMS | MORE_ARMS})
    for arm in work.dag.arms:
        prepare(work, arm, log=QUIET)
    return work


def run(work, objective, model=None, progress=(0, 10)):
    """One step on `EXAMPLES`: its loss, the batch, the recorded keys and values as leaves, logits and states."""
    batch = collate(work.student_encoding("train"), EXAMPLES, work.student_tokenizer.pad_token_id)
    model = work.student(0) if model is None else model
    head = Head.of(model)
    with Recorder(model, hidden=True) as recorder:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        states, _ = final_states(model, head, **inputs)
        kv = recorder.kv().detach()
        kv.keys.requires_grad_(), kv.values.requires_grad_()
        said = objective.read(batch)
        student = Student(head, states, Given(kv, recorder))
        loss = objective(batch, student, progress, said)
        fused = objective.resolve(batch, said, student).fused
    return SimpleNamespace(
        loss=loss,
        batch=batch,
        kv=kv,
        logits=head.logits(states),
        states=states,
        said=said,
        fused=fused,
        student=student,
    )


def gradient(found, objective, name, leaf):
    """Of one term alone."""
    said = objective.resolve(found.batch, found.said, found.student)
    whole = objective.whole({n: row[None] for n, row in objective.measure(found.batch, said).items()})
    total = objective.loss(found.batch, said, whole, found.student, (0, 10), only=name).total
    return torch.autograd.grad(total, leaf, retain_graph=True)[0]


def divided(loss):
    """What is watched of a batch in one part."""
    return {name: above / below for name, (above, below) in loss.watch().items()}


def by_hand(own, target, mask, scaled):
    """Mean over unmasked positions of the squared residual, each layer in units of its target's deviation."""
    total = 0.0
    for layer in range(len(own)):
        shown = target[layer].transpose(1, 2)[mask]  # position head dim
        residual = own[layer].transpose(1, 2)[mask] - shown
        total += (residual / (shown.std(correction=0) if scaled else 1)).square().mean()
    return total / len(own)


def changed(arm, **loss):
    """An arm with another loss."""
    return arm.model_copy(update={"loss": {name: TERMS(kind=name, **options) for name, options in loss.items()}})


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
    assert all(isinstance(t, ProjectedTargets) for t in load_objective(work, arm, 0).targets.targets)
    assert all(isinstance(t, HeldTargets) for t in load_objective(work, work.dag.arm("two"), 0).targets.targets)


# ---------------------------------------------------------------- cross-entropy
@pytest.mark.parametrize("name", ["control", "many", "logit"])
def test_cross_entropy_is_the_models_own(work, name):
    found = run(work, load_objective(work, work.dag.arm(name), 0))
    nll = token_nll(found.logits, found.batch.labels)
    torch.testing.assert_close(found.loss.values["cross_entropy"], nll.sum() / found.batch.predicted.sum())


def test_control_asks_nobody_and_records_nothing(work):
    objective = load_objective(work, work.dag.arm("control"), 0)
    assert list(objective.terms) == ["cross_entropy"] and not objective.teachers and not objective.records


def test_terms_add_up(work):
    """The total is the weighted sum, the gradient that of the terms alone; a term whose weight is 0 now has none."""
    objective = load_objective(work, work.dag.arm("many"), 0)
    found = run(work, objective)
    weights = found.loss.weights
    assert weights == {"cross_entropy": 1, "keys": 1, "values": 1, "logits": 0.5}
    expected = sum(weights[name] * value for name, value in found.loss.values.items())
    torch.testing.assert_close(found.loss.total.detach(), expected)
    whole = torch.autograd.grad(found.loss.total, found.states, retain_graph=True)[0]
    alone = [weights[name] * gradient(found, objective, name, found.states) for name in ("cross_entropy", "logits")]
    torch.testing.assert_close(whole, sum(alone), atol=1e-6, rtol=1e-4)
    later = run(work, objective, progress=(5, 10)).loss
    assert later.weights["values"] == 0 and later.values["values"] > 0
    torch.testing.assert_close(later.total.detach(), expected - found.loss.values["values"])


# ---------------------------------------------------------------- keys and values
@pytest.mark.parametrize("scale", ["std", "none"])
def test_terms_are_the_loss_by_hand(work, scale):
    arm = changed(work.dag.arm("task"), keys={"weight": 0.5, "scale": scale}, values={"weight": 3.0, "scale": scale})
    objective = load_objective(work, arm, 0)
    found = run(work, objective)
    fetched = [t.fetch(EXAMPLES, found.batch.input_ids.shape[1]) for t in objective.targets.targets]
    present = torch.stack([mask for _, mask in fetched]).float()
    tasks = [work.records("train")[e].task for e in EXAMPLES]
    assert len(set(tasks)) == 2
    weight = torch.tensor([TABLE[task] for task in tasks]).T[:, :, None] * present
    weight = weight / weight.sum(0).clamp(min=1e-9)
    mask = found.batch.mask & (present.sum(0) > 0)
    for name, factor in (("keys", 0.5), ("values", 3.0)):
        target = sum(w[None, :, None, :, None] * getattr(kv, name) for w, (kv, _) in zip(weight, fetched, strict=True))
        assert found.loss.weights[name] == factor
        own = getattr(found.kv, name).detach()
        torch.testing.assert_close(
            found.loss.values[name], by_hand(own, target, mask, scale == "std"), atol=1e-4, rtol=1e-4
        )
    watched = divided(found.loss)
    assert watched["masked_share"] == pytest.approx(1 - (mask.sum() / found.batch.mask.sum()).item())
    for name in ("keys", "values"):
        layers = [watched[f"layer/{name}/{layer}"] for layer in range(len(found.kv.keys))]
        assert len(layers) == len(set(layers)) > 1
        assert sum(layers) / len(layers) == pytest.approx(found.loss.values[name].item(), rel=1e-4)
    for task in TABLE:
        shares = [watched[f"weight/{task}/{name}"] for name in ("alpha", "beta")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "name", ["one", "attention", "select", "span", "own", "shuffled", "position", "cka", "elastic"]
)
def test_masked_positions_contribute_nothing(work, name):
    objective = load_objective(work, work.dag.arm(name), 0)
    found = run(work, objective)
    counted = found.batch.mask & found.fused.mask
    assert counted.any(1).all() and not counted.all()
    for term, own in (("keys", found.kv.keys), ("values", found.kv.values)):
        touched = (gradient(found, objective, term, own) != 0).any(0).any(1).any(-1)
        assert torch.equal(touched, counted)


def test_a_student_that_has_the_targets_has_no_loss(work):
    objective = load_objective(work, work.dag.arm("one"), 0)
    batch = collate(work.student_encoding("train"), EXAMPLES, 0)
    kv, _ = objective.targets.targets[0].fetch(EXAMPLES, batch.input_ids.shape[1])
    states = torch.zeros(*batch.input_ids.shape, 24)
    loss = objective(batch, Student(Head.of(work.student(0)), states, Given(kv)))
    assert loss.values["keys"] == loss.values["values"] == 0


def test_skipped_positions_and_layers_and_the_schedule(work):
    schedule = ScheduleConfig(kind="linear", final=0.5)
    arm = changed(work.dag.arm("one"), values={"weight": 2.0, "skip_sink": 4, "layers": [2, 0], "schedule": schedule})
    objective = load_objective(work, arm, 0)
    found = run(work, objective, progress=(5, 10))
    assert set(found.loss.values) == {"cross_entropy", "values"}
    assert found.loss.weights["values"] == pytest.approx(1.5)
    by_values = gradient(found, objective, "values", found.kv.values)
    assert not by_values[1].any() and not by_values[:, :, :, :4].any()
    assert by_values[0].any() and by_values[2].any()


def test_attention_outputs_are_read_by_the_students_queries(work):
    """Against the outputs of the fused cache, in which a position without a target keeps the student's own entry."""
    found = run(work, load_objective(work, changed(work.dag.arm("two"), attention={"scale": "none"}), 0))
    own, mask = found.kv, found.batch.mask & found.fused.mask
    inside = mask[None, :, None, :, None]
    mixed = KV(*(torch.where(inside, getattr(found.fused.fused, k), getattr(own, k)) for k in ("keys", "values")))
    queries, ropes = found.student.queries, found.student.ropes
    one, two = (attention_outputs(queries, kv, ropes).detach() for kv in (own, mixed))
    gap = (one - two).square().mean((0, 2, 4))
    torch.testing.assert_close(found.loss.values["attention"], gap[mask].mean(), atol=1e-4, rtol=1e-4)


def test_attention_kl_is_the_divergence_of_the_models_own_attention_weights(work):
    """Of the student's: weights by the definition, keys of a position without a target its own; only keys are moved."""
    arm = changed(work.dag.arm("own"), attention_kl={"layers": [2, 0], "skip_sink": 1})
    objective = load_objective(work, arm, 0)
    found = run(work, objective)
    own, mask = found.kv.keys.detach(), found.batch.mask & found.fused.mask
    keys = torch.where(mask[None, :, None, :, None], found.fused.fused.keys, own)
    time, total = own.shape[3], 0.0
    counted = mask.clone()
    counted[:, :1] = False
    for layer in (2, 0):
        rope, positions = found.student.ropes[layer], torch.arange(time)
        q = rope.rotate(found.student.queries[layer].detach(), positions)
        ours, theirs = (rope.rotate(k[layer], positions).repeat_interleave(2, dim=1) for k in (own, keys))
        for b, t in counted.nonzero().tolist():
            for head in range(4):
                p, r = ((k[b, head, : t + 1] @ q[b, head, t] / 6**0.5).softmax(0) for k in (theirs, ours))
                total += (p * (p / r).log()).sum() / 4 / 2
    torch.testing.assert_close(found.loss.values["attention_kl"], total / counted.sum(), atol=1e-4, rtol=1e-3)
    moved = gradient(found, objective, "attention_kl", found.kv.keys)
    assert moved[0].any() and moved[2].any() and not moved[1].any()


def test_layers_open_from_shallow_to_deep(work):
    """One after the other over the given share of the steps; the term is then the one without."""
    arm = work.dag.arm("one")
    opening = load_objective(work, changed(arm, values={"opening": 0.6}), 0)
    plain = run(work, load_objective(work, changed(arm, values={}), 0))
    whole = gradient(plain, load_objective(work, changed(arm, values={}), 0), "values", plain.kv.values)
    for step, shares in ((0, [0, 0, 0]), (1, [0.5, 0, 0]), (3, [1, 0.5, 0]), (6, [1, 1, 1]), (9, [1, 1, 1])):
        found = run(work, opening, progress=(step, 10))
        total = found.loss.total - found.loss.values["cross_entropy"]
        (own,) = torch.autograd.grad(total, found.kv.values)
        torch.testing.assert_close(own, whole * torch.tensor(shares).reshape(-1, 1, 1, 1, 1), atol=1e-7, rtol=1e-4)


def test_gradients_reach_trainable_projectors_only(work):
    frozen = load_objective(work, work.dag.arm("two"), 0)
    assert not [p for p in frozen.parameters() if p.requires_grad]
    teacher = work.aligned_teacher(work.dag.arm("one"), "alpha")
    (projector,) = fitted(work, work.dag.arm("one"), [teacher.layers])
    not_held = build_targets(teacher, projector, True, 0.0)
    assert list(not_held.parameters()) and not any(p.requires_grad for p in not_held.parameters())
    joint = load_objective(work, work.dag.arm("joint"), 0)
    run(work, joint).loss.total.backward()
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
        run(work, load_objective(work, work.dag.arm(name), 0)).loss.values["keys"] for name in ("two", "shuffled")
    )
    assert own != shuffled


@pytest.mark.parametrize("mode", ["stored", "live"])
def test_selection_follows_the_teachers_losses(work, mode):
    arm = work.dag.arm("select")
    settings = work.config.model_copy(update={"store": work.config.store.model_copy(update={"mode": mode})})
    objective = load_objective(Inputs(settings, work.paths), arm, 0)
    found = run(work, objective)
    losses = torch.stack([rows.loss for rows in found.said.rows])
    for row, name in enumerate(arm.teachers):
        encoding, model = work.encoding(name, "train", "student"), load_model(work.paths.model(name))
        ids = torch.from_numpy(encoding.ids[encoding.rows(EXAMPLES[1])])[None]
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        assert losses[row, 1] == pytest.approx(expected.item(), rel=1e-3)
    best = losses.argmin(0)
    alone = found.fused.present.sum(0) < 2
    weights = found.fused.fused.weights[:, 0, :, 0].expand(-1, -1, alone.shape[1])
    for example in range(len(EXAMPLES)):
        assert (weights[best[example], example][~alone[example]] == 1).all()


def test_selection_per_span_takes_for_each_token_the_teacher_that_finds_its_bytes_likeliest(work):
    found = run(work, load_objective(work, work.dag.arm("span"), 0))
    nats = torch.stack([rows.columns["nll"] for rows in found.said.rows])
    both = found.fused.present.all(0) & (nats[0] != nats[1])
    picked = found.fused.fused.weights[:, 0, :, 0].argmax(0)
    assert torch.equal(picked[both], nats.argmin(0)[both])
    assert len(picked[both].unique()) == 2


# ---------------------------------------------------------------- terms without caches
@pytest.fixture(scope="module")
def selfsame(tmp_path_factory):
    """A student that *is* the teacher, which keeps its whole next-token distribution."""
    folder = tmp_path_factory.mktemp("selfsame")
    teacher = {"source": "local", "path": str(folder / "teachers" / "alpha")}
    losses = {
        "logits": {},
        "all": {"kind": "logits", "candidates": "all"},
        "relations": {"heads": 2},
        "hidden": {"layers": [1, -1]},
        "final_state": {"distance": "mse"},
        "likelihood": {"temperature": 20},
    }
    arms = {
        name: {"base": "control", "set": {"teachers": ["alpha"], "loss": {name: options}}}
        for name, options in losses.items()
    }
    build(folder)
    vocabulary = load_model(folder / "teachers" / "alpha").config.vocab_size
    overrides = {
        "models.student": teacher,
        "arms": {"control": ARMS["control"], **arms},
        "store.top_logits": vocabulary,
        "store.dtype": "fp16",
    }
    work = Inputs(config(folder, overrides), build(folder / "again", overrides).paths)
    for name in arms:
        prepare(work, name, log=QUIET)
    return work


@pytest.mark.parametrize("name", ["logits", "all", "relations", "hidden", "final_state", "likelihood"])
def test_a_model_has_nothing_to_learn_from_itself(selfsame, name):
    objective = load_objective(selfsame, selfsame.dag.arm(name), 0)
    own = run(selfsame, objective, load_model(selfsame.paths.model("student"))).loss.values[name]
    other = run(selfsame, objective, load_model(selfsame.paths.model("student")).apply(_jitter)).loss.values[name]
    assert own.abs() < min(1e-3, 0.05 * other)


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


def test_logits_are_the_teachers_divergences_by_the_task_table(work):
    arm, values = work.dag.arm("logit"), []
    for row in ([0.6, 0.4], [1.0, 0.0], [0.0, 1.0]):
        fuse = FUSIONS("task", weights={"default": row})
        found = run(work, load_objective(work, arm.model_copy(update={"fuse": fuse}), 0))
        values.append(found.loss.values["logits"])
    torch.testing.assert_close(values[0], 0.6 * values[1] + 0.4 * values[2])
    ids, logprobs, mask = found.said.top[1]
    by_row = logit_kd_loss(found.logits, ids, logprobs, mask).detach()
    torch.testing.assert_close(values[2], by_row.sum() / found.batch.mask.sum())
    assert values[1] != values[2]


def test_states_are_compared_through_their_maps(work):
    """Cosine of hidden states, mean squared error of final ones in units of the target's deviation."""
    torch.manual_seed(3)
    objective = load_objective(work, work.dag.arm("states"), 0)
    found = run(work, objective)
    tokens = 0
    cosines, errors = 0.0, 0.0
    for number, (name, layers) in enumerate((("alpha", 4), ("beta", 5))):
        rows = found.said.rows[number]
        mask = found.batch.mask & rows.mask
        tokens += 0.5 * mask.sum()
        depth, kept = proportional_map(layers, 3), work.stored_hidden(name, "student")
        for place, layer in enumerate((0, -1)):
            own = objective.terms["hidden"].maps[number][place](found.student.hidden[layer][mask])
            theirs = rows.columns["hidden"][mask][:, kept.index(depth[layer])]
            cosines += 0.5 * (1 - torch.cosine_similarity(own, theirs, dim=-1)).sum() / 2
        own, theirs = objective.terms["final_state"].maps[number][0](found.states[mask]), rows.columns["states"][mask]
        errors += 0.5 * ((own - theirs) / theirs.std(correction=0)).square().mean(-1).sum()
    torch.testing.assert_close(found.loss.values["hidden"], (cosines / tokens).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.loss.values["final_state"], (errors / tokens).detach(), atol=1e-5, rtol=1e-4)
    found.loss.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())


def test_likelihood_compares_pieces_that_end_together(work):
    found = run(work, load_objective(work, work.dag.arm("likelihood"), 0))
    nll = token_nll(found.logits, found.batch.input_ids).detach()
    total, tau = 0.0, 10
    for name in ("alpha", "beta"):
        src, dst = work.encoding(name, "train", "student"), work.student_encoding("train")
        model = load_model(work.paths.model(name))
        for row, example in enumerate(EXAMPLES):
            ids = torch.from_numpy(src.ids[src.rows(example)])[None]
            theirs = token_nll(model(input_ids=ids).logits, ids)[0].detach().numpy()
            src_ends, dst_ends = src.spans[src.rows(example)][:, 1], dst.spans[dst.rows(example)][:, 1]
            own = nll[row, : len(dst_ends)].numpy()
            own[-1] = 0  # the end token
            ends = [e for e in dst_ends if e in src_ends]
            # the first piece is left out; an end token has no bytes, and so no piece
            for start, stop in pairwise(ends):
                if start == stop:
                    continue
                p = np.exp(-theirs[(src_ends > start) & (src_ends <= stop)].sum() / tau)
                q = np.exp(-own[(dst_ends > start) & (dst_ends <= stop)].sum() / tau)
                p, q = (np.clip(x, np.exp(-50), np.exp(-1e-6)) for x in (p, q))
                total += 0.5 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert found.loss.values["likelihood"] == pytest.approx(total / found.batch.mask.sum().item(), rel=0.02)
