"""The method in anybody's training loop: `Distiller.fit`, then `record` around the forward and `loss` beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpipe.align.layermap import layer_plan
from kvpipe.align.timemap import build_time_map, shared_spans
from kvpipe.cache.capture import Recorder, kv_geometry
from kvpipe.cache.forward import Keep
from kvpipe.cache.store import Store, StoreKey, build_shard, write_index
from kvpipe.cache.teacher import Aligned, AlignedTeacher, LiveRows, RowSource, StoredRows
from kvpipe.config import Arm, FitConfig, StoreConfig
from kvpipe.config.terms import HiddenConfig
from kvpipe.data.batches import Batch
from kvpipe.data.encoding import Encoding, encode_texts, encoded_ids
from kvpipe.distill.build import build_objective
from kvpipe.distill.fit import fit_projectors
from kvpipe.distill.objective import Loss, Objective, TopLogits
from kvpipe.distill.projectors import Geometry, build_projector
from kvpipe.distill.terms import Facts, Said, Student, TeacherFacts, teacher_layers
from kvpipe.experiment.files import GB, read_json, save_tensors, write_json
from kvpipe.experiment.sizes import estimate_bytes
from kvpipe.models.head import Head
from kvpipe.tokens.decode import decoded
from kvpipe.tokens.matrix import common_prefix_positions
from kvpipe.tokens.segments import Segmented
from kvpipe.tokens.vocabulary import same_tokens

TOP, TOPS = 16, ("top_ids", "top_logprobs")
"""Next-token candidates that are read of each teacher for `logits`."""
WEIGHTS, DOCUMENT, TEXTS = "distiller.safetensors", "distiller.json", "texts.json"


def KV(keys: float = 1.0, values: float = 1.0, **options: Any) -> dict[str, dict[str, Any]]:
    """Terms `keys` and `values` with these weights, both with the same options; one of weight 0 is left out.

    >>> KV(keys=0, values=3.0)
    {'values': {'weight': 3.0}}
    """
    weights = {"keys": keys, "values": values}
    return {name: {"weight": weight, **options} for name, weight in weights.items() if weight}


def Logits(weight: float = 1.0, **options: Any) -> dict[str, dict[str, Any]]:
    """Term `logits`.

    >>> Logits(0.5, temperature=2.0)
    {'logits': {'weight': 0.5, 'temperature': 2.0}}
    """
    return {"logits": {"weight": weight, **options}}


@dataclass
class Teacher:
    """A teacher's model and tokenizer, in memory; its store where it was run over the texts beforehand."""

    name: str
    model: Any
    tokenizer: Any
    store: Store | None = None
    known: Mapping[str, int] | None = None
    """Text → its example in the store."""
    encoding: Encoding | None = None
    """Of the stored texts."""
    layers: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()

    @property
    def pad_id(self) -> int:
        """Of padding, which is masked everywhere."""
        return _pad_id(self.tokenizer)


@dataclass
class Run:
    """The student's last forward while `Distiller.record` is entered."""

    head: Head
    recorder: Recorder | None
    states: Tensor | None = None

    @property
    def student(self) -> Student:
        """What the terms see of it.

        Raises:
            RuntimeError: there was none.
        """
        if self.states is None:
            raise RuntimeError(
                "no forward of the student was recorded: call the model inside `with distiller.record(model)`"
            )
        return Student(self.head, self.states, self.recorder)


class Distiller(nn.Module):
    """The terms that a student learns from its teachers, for any loop.

    >>> distiller = Distiller.fit(student, tokenizer, teachers={"big": "folder"}, texts=texts)   # doctest: +SKIP
    >>> with distiller.record(student) as run:                                                   # doctest: +SKIP
    ...     loss = student(**batch, labels=labels).loss + distiller.loss(run, batch)

    Batches are padded on the right. Texts are told by their tokens: what the ids spell is what the teachers read, each
    with its own tokenizer. Parameters (trainable projectors, learned fusions, maps of states) belong into the optimizer.
    """

    def __init__(self, arm: Arm, objective: Objective, teachers: Sequence[Teacher], tokenizer: Any):
        super().__init__()
        self.arm, self.objective, self.tokenizer = arm, objective, tokenizer
        self.teachers = list(teachers)
        self._head: tuple[Any, Head] | None = None
        self.last: Loss | None = None
        """The last loss with all its terms, for logs."""

    # ------------------------------------------------------------ building
    @classmethod
    def fit(
        cls,
        student: nn.Module,
        tokenizer: Any,
        teachers: Mapping[str, Any],
        texts: Sequence[str],
        *,
        terms: Mapping[str, Any] | None = None,
        time: Mapping[str, Any] | None = None,
        layers: Mapping[str, Any] | None = None,
        projector: Mapping[str, Any] | None = None,
        fit: Mapping[str, Any] | None = None,
        fusion: Mapping[str, Any] | None = None,
        store: str | Path | None = None,
        batch_size: int = 8,
        log=print,
    ) -> Distiller:
        """Align, fit and put together; what it will cost is said first.

        Args:
            student: with weights; its own keys and values are what projectors are fitted to (`ridge`).
            tokenizer: the student's, a fast one.
            teachers: name → folder, hub id, or (model, tokenizer).
            texts: what projectors are fitted on, and what is stored.
            terms: as under `loss` of an arm, by default `KV()`: `KV(values=3.0) | Logits(0.5)`.
            time: as `time` of an arm.
            layers: as `layer` of an arm, `proportional` or a `list`.
            projector: as `projector` of an arm.
            fit: as `fit` of an arm; `ridge` by default.
            fusion: as `fuse` of an arm.
            store: folder for the teachers' rows of the texts, which are then read and not computed; none runs them live.
            batch_size: texts that a teacher reads at once, at most.
            log: takes lines.

        Raises:
            ValueError: settings that do not go together, or that need what there is not.
        """
        arm = _arm(teachers, terms, time, layers, projector, fit, fusion)
        loaded = [Teacher(name, *_loaded(entry)) for name, entry in teachers.items()]
        facts, plans = _facts(arm, student, loaded)
        written = [Segmented(answer=text) for text in texts]
        names = [str(number) for number in range(len(texts))]
        dst = encode_texts(names, written, tokenizer)
        _say(arm, loaded, dst, student, store, log)
        aligned = []
        for teacher in loaded:
            src = encode_texts(names, written, teacher.tokenizer)
            if store is not None:
                _store(teacher, arm, src, texts, Path(store) / teacher.name, batch_size)
            aligned.append(
                AlignedTeacher(
                    teacher.name, _rows(teacher, src, batch_size), src, dst, build_time_map(arm.time, src, dst)
                )
            )
        projectors = []
        if "targets" in arm.needs:
            for teacher, plan in zip(loaded, plans, strict=True):
                parameters = sum(p.numel() for p in teacher.model.parameters())
                geometry = _geometry(student.config, teacher.model.config)
                projectors.append(build_projector(arm.projector, geometry, plan.within(teacher.layers), parameters))
            fit_projectors(projectors, aligned, arm.fit, student, dst, _pad_id(tokenizer), batch_size)
        objective = build_objective(arm, None, facts, aligned, projectors)
        return cls(arm, objective, loaded, tokenizer).to(next(student.parameters()).device)

    # ------------------------------------------------------------ in the loop
    @contextmanager
    def record(self, model: nn.Module) -> Iterator[Run]:
        """Record every forward of the student that is made inside; `loss` looks at the last one.

        Args:
            model: the student as it is called, also inside DDP or peft.
        """
        whole: Any = getattr(model, "module", model)
        if self._head is None or self._head[0] is not whole:  # of the model's own parameters, so it follows them
            self._head = (whole, Head.of(whole))
        run, hidden = Run(self._head[1], None), self.objective.records_hidden
        with ExitStack() as entered:
            if self.objective.records:
                queries = self.objective.records_queries
                run.recorder = entered.enter_context(Recorder(model, hidden, queries=queries))
            if run.head.weight is None:
                handle = whole.register_forward_hook(lambda _m, _a, output: setattr(run, "states", output.logits))
            else:

                def hold(_layer: nn.Module, args: tuple[Tensor]) -> None:
                    run.states = args[0]

                handle = whole.get_output_embeddings().register_forward_pre_hook(hold)
            entered.callback(handle.remove)
            yield run

    def loss(
        self,
        run: Run,
        batch: Mapping[str, Tensor],
        progress: tuple[int, int] = (0, 1),
        tasks: Sequence[str] | None = None,
    ) -> Float[Tensor, ""]:
        """The weighted sum of all terms on the batch of the last forward; the terms themselves are in `last`.

        Args:
            run: of `record`.
            batch: `input_ids` and `attention_mask`, `(batch, time)`, padded on the right.
            progress: (step, steps), where a term has a schedule.
            tasks: of each text, for a fusion by task.

        Raises:
            ValueError: padding on the left, ids that spell no text, or a text that the stored teachers have not read.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.long()
        if mask.shape[1] > 1 and (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError("attention_mask: the batch is padded on the left; set tokenizer.padding_side = 'right'")
        own = Batch(np.arange(len(ids)), ids, mask, torch.where(mask.bool(), ids, -100))
        self.objective.tasks = None if tasks is None else np.array(tasks)
        student, said = run.student, self._ask(own)
        self.last = self.objective(own, student, progress, said)
        return self.last.total

    def _ask(self, batch: Batch) -> Said:
        """What the teachers say of a batch that is told by its ids."""
        dst, length = (
            encoded_ids(
                [row[mask] for row, mask in zip(batch.input_ids.cpu(), batch.mask.cpu(), strict=True)],
                lambda ids: decoded(self.tokenizer, ids),
            ),
            batch.input_ids.shape[1],
        )
        rows: list[Aligned | None] = []
        top: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, teacher in enumerate(self.teachers):
            columns = self.objective.columns(number)
            examples = np.arange(len(dst))
            if teacher.store is None:
                src = encode_texts([str(i) for i in examples], list(dst.texts), teacher.tokenizer)
                source: RowSource = _rows(teacher, src, len(dst))
            else:
                src, source = _taken(teacher, [text.text for text in dst.texts])
            if columns:
                time = build_time_map(self.arm.time, src, dst)
                rows.append(AlignedTeacher(teacher.name, source, src, dst, time).aligned(examples, length, columns))
            else:
                rows.append(None)
            if "top_logits" in self.arm.needs:
                top.append(_candidates(teacher, source, src, dst, self.tokenizer).padded(examples, length))
        return self.objective.said(batch, rows, top)

    # ------------------------------------------------------------ on disk
    def save(self, folder: str | Path) -> None:
        """Write projectors, fusion and maps (safetensors) and the settings (JSON); stores stay where they are."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(
            {name: t.detach().cpu().contiguous() for name, t in self.objective.state_dict().items()}, folder / WEIGHTS
        )
        stores = {t.name: str(t.store.folder.resolve()) for t in self.teachers if t.store is not None}
        write_json(folder / DOCUMENT, {"arm": self.arm.model_dump(mode="json", exclude_unset=True), "stores": stores})

    @classmethod
    def load(cls, folder: str | Path, student: nn.Module, tokenizer: Any, teachers: Mapping[str, Any]) -> Distiller:
        """What `save` has written, for the same models.

        Raises:
            ValueError: other teachers, or models of another shape.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        document = read_json(folder / DOCUMENT, "save the distiller again")
        arm = Arm.model_validate(document["arm"])
        if list(teachers) != arm.teachers:
            raise ValueError(
                f"{folder / DOCUMENT}: was fitted for the teachers {', '.join(arm.teachers)}, in this order"
            )
        loaded = [Teacher(name, *_loaded(entry)) for name, entry in teachers.items()]
        facts, plans = _facts(arm, student, loaded)
        projectors, aligned = [], []
        for teacher, plan in zip(loaded, plans, strict=True):
            if teacher.name in document["stores"]:
                _reopen(teacher, Path(document["stores"][teacher.name]))
            if "targets" in arm.needs:
                parameters = sum(p.numel() for p in teacher.model.parameters())
                geometry = _geometry(student.config, teacher.model.config)
                projectors.append(build_projector(arm.projector, geometry, plan.within(teacher.layers), parameters))
            aligned.append(_unread(teacher, tokenizer))
        objective = build_objective(arm, None, facts, aligned, projectors)
        try:
            objective.load_state_dict(load_file(folder / WEIGHTS))
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS} does not fit these models: {error}") from None
        return cls(arm, objective, loaded, tokenizer).to(next(student.parameters()).device)


class DistillationMixin:
    """In front of `transformers.Trainer`, or of a class made from it such as TRL's `SFTTrainer`: adds a distiller's loss.

    >>> class DistillTrainer(DistillationMixin, Trainer): ...                                    # doctest: +SKIP
    >>> DistillTrainer(model=student, args=args, train_dataset=data, distiller=distiller).train()   # doctest: +SKIP

    The terms are logged as `distill/<term>`. Under gradient accumulation a micro-batch's terms are means of its own, and
    the step's are the mean of these.
    """

    def __init__(self, *args: Any, distiller: Distiller, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.distiller = distiller
        self._terms: dict[str, float] = {}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """With what the distiller trains."""
        optimizer: Any = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        trained, known = [p for p in self.distiller.parameters() if p.requires_grad], optimizer.param_groups
        if trained and not any(p is trained[0] for group in known for p in group["params"]):
            optimizer.add_param_group({"params": trained, "weight_decay": 0.0})
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The trainer's own loss and the distiller's; in evaluation the trainer's alone."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        with self.distiller.record(model) as run:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        state, parts = self.state, self.args.gradient_accumulation_steps  # type: ignore[attr-defined]
        added = self.distiller.loss(run, batch, (state.global_step, max(1, state.max_steps)))
        # the trainer divides what it sums over a step's micro-batches, unless the model has been told of them all
        loss = loss + (added / parts if kwargs.get("num_items_in_batch") is not None else added)
        assert self.distiller.last is not None
        self._terms = {f"distill/{name}": value.item() for name, value in self.distiller.last.values.items()}
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the terms of the last batch, where the loss is logged."""
        super().log(logs | self._terms if "loss" in logs else logs, *args, **kwargs)  # type: ignore[misc]


# ---------------------------------------------------------------- settings
def _arm(teachers, terms, time, layers, projector, fit, fusion) -> Arm:
    """The settings as an arm without cross-entropy, which the loop has."""
    loss = {**(KV() if terms is None else terms), "cross_entropy": {"weight": 0}}
    given = {"time": time, "layer": layers, "projector": projector, "fit": fit, "fuse": fusion}
    values = {name: dict(section) for name, section in given.items() if section is not None}
    arm = Arm.model_validate({"teachers": list(teachers), "loss": loss, **values})
    if "targets" in arm.needs and fit is None and "ridge" in arm.projector.fits:
        arm = arm.model_copy(update={"fit": FitConfig(method="ridge")})
    if arm.time.kind == "segment":
        raise ValueError(
            "time.kind: segment needs texts in segments, which a batch of ids has not; use kvpipe's workflow"
        )
    if arm.fit.basis == "whole":
        raise ValueError("fit.basis: whole is the workflow's, which knows what a student was pruned of; use student")
    if arm.layer.kind == "cka":
        raise ValueError(
            "layers: cka needs a layer map, which `kvpipe layer-map` measures; give {kind: list, layers: […]}"
        )
    return arm


def _loaded(entry: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, a hub id, or of themselves."""
    if not isinstance(entry, str | Path):
        model, tokenizer = entry
        return model.eval(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(str(entry), dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(str(entry))


def _pad_id(tokenizer: Any) -> int:
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def _geometry(student: Any, teacher: Any) -> Geometry:
    _, src_heads, src_dim = kv_geometry(teacher)
    dst_layers, dst_heads, dst_dim = kv_geometry(student)
    return Geometry(src_heads, src_dim, dst_heads, dst_dim, dst_layers)


def _facts(arm: Arm, student: nn.Module, teachers: Sequence[Teacher]) -> tuple[Facts, list[Any]]:
    """What terms know of the models; the layers that are read of each teacher are noted in it. And the layer plans."""
    own = student.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    dst_layers, found, plans = kv_geometry(own).layers, [], []
    for teacher in teachers:
        config = teacher.model.config.get_text_config(decoder=True)
        layers = kv_geometry(config).layers
        hidden = {n for term in arm.of_kind(HiddenConfig) for n in teacher_layers(term, layers, dst_layers)}
        plan = layer_plan(arm.layer, layers, dst_layers, None)
        planned = plan.src_layers if "targets" in arm.needs else []
        last = [layers - 1] if "keys" in arm.needs else []
        teacher.layers, teacher.hidden = tuple(sorted({*planned, *last})), tuple(sorted(hidden))
        head = Head.of(teacher.model) if "heads" in arm.needs else None
        found.append(TeacherFacts(layers, config.hidden_size, teacher.hidden, head))
        plans.append(plan)
    return Facts(dst_layers, own.hidden_size, tuple(found)), plans


def _say(arm: Arm, teachers: Sequence[Teacher], dst: Encoding, student: Any, store: Any, log) -> None:
    """What is needed and what it costs, before anything is computed."""
    columns = ", ".join(sorted(need for need in arm.needs if not need.startswith("own_"))) or "nothing"
    log(f"kvpipe: terms {', '.join(arm.loss)}; of the teachers: {columns}; {len(dst)} texts, {len(dst.ids):,} tokens")
    for teacher in teachers:
        parameters = sum(p.numel() for p in teacher.model.parameters())
        memory = sum(p.numel() * p.element_size() for p in teacher.model.parameters()) / GB
        size = (
            estimate_bytes(StoreConfig(), kv_geometry(teacher.model.config), len(teacher.layers), len(dst.ids), 0) / GB
        )
        how = "runs live in every step" if store is None else f"runs once; its store takes about {size:.3f} GB"
        log(f"kvpipe: {teacher.name}, {parameters / 1e6:.3g} million parameters, {memory:.2f} GB in memory: {how}")


# ---------------------------------------------------------------- rows
def _rows(teacher: Teacher, src: Encoding, batch_size: int) -> RowSource:
    if teacher.store is not None:
        return StoredRows(teacher.store, src.offsets)
    return LiveRows(teacher.model, src, teacher.layers, teacher.pad_id, batch_size, teacher.hidden)


def _keep(arm: Arm, teacher: Teacher) -> Keep:
    return Keep(
        layers=teacher.layers,
        nll=bool(arm.needs & {"nll", "teacher_losses", "span_losses"}),
        top=TOP if "top_logits" in arm.needs else 0,
        states="states" in arm.needs,
        hidden=teacher.hidden,
    )


def _store(teacher: Teacher, arm: Arm, src: Encoding, texts: Sequence[str], folder: Path, batch_size: int) -> None:
    """Run a teacher over the texts into a store; one that is there and of the same is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    keep = _keep(arm, teacher)
    config = StoreConfig(batch_size=batch_size, top_logits=keep.top)
    key = StoreKey(
        model=_weights_digest(teacher.model),
        data=sha256(json.dumps([list(texts), src.ids.tolist()]).encode()).hexdigest()[:16],
        layers=keep.layers,
        reading="student",
        dtype=config.dtype,
        top_logits=keep.top,
        shards=1,
        nll=keep.nll,
        states=keep.states,
        hidden=keep.hidden,
    )
    shard = folder / "shard-00000.safetensors"
    build_shard(teacher.model, src, key, config, 0, shard, teacher.pad_id)
    write_index(folder, key, [shard])
    write_json(folder / TEXTS, {"texts": list(texts)})
    teacher.store, teacher.encoding = Store.open(folder), src
    teacher.known = {text: number for number, text in enumerate(texts)}


def _reopen(teacher: Teacher, folder: Path) -> None:
    """The store of a distiller that was saved."""
    texts = read_json(folder / TEXTS, "fit the distiller again")["texts"]
    teacher.store = Store.open(folder)
    teacher.encoding = encode_texts(
        [str(n) for n in range(len(texts))], [Segmented(answer=t) for t in texts], teacher.tokenizer
    )
    teacher.known = {text: number for number, text in enumerate(texts)}


def _taken(teacher: Teacher, texts: Sequence[str]) -> tuple[Encoding, RowSource]:
    """The stored examples of some texts, as an encoding of their own."""
    assert teacher.known is not None and teacher.encoding is not None and teacher.store is not None
    missing = [text for text in texts if text not in teacher.known]
    if missing:
        raise ValueError(
            f"{teacher.store.folder} has not read the text {missing[0][:40]!r} ({len(missing)} of the batch): give it to "
            "`Distiller.fit` among the texts, cut as the loop cuts it, or leave out store, which runs the teacher live"
        )
    numbers = np.array([teacher.known[text] for text in texts])
    return teacher.encoding.taken(numbers), _Taken(StoredRows(teacher.store, teacher.encoding.offsets), numbers)


class _Taken:
    """Some examples of a source, numbered anew."""

    def __init__(self, source: StoredRows, numbers: Int64[np.ndarray, "example"]):
        self.source, self.numbers, self.layers, self.hidden = source, numbers, source.layers, source.hidden

    def fetch(self, examples: Int64[np.ndarray, "example"], columns: Sequence[str]) -> Mapping[str, Tensor]:
        """Those of the source."""
        return self.source.fetch(self.numbers[examples], columns)


def _candidates(teacher: Teacher, source: RowSource, src: Encoding, dst: Encoding, tokenizer: Any) -> TopLogits:
    """A teacher's next-token candidates on a batch."""
    same = torch.from_numpy(same_tokens(teacher.tokenizer, tokenizer))
    if not isinstance(source, _Taken):
        return TopLogits.live(teacher.model, src, dst, same, TOP, len(src), teacher.pad_id)
    found, pairs = source.fetch(np.arange(len(src)), TOPS), common_prefix_positions(*shared_spans(src, dst))
    return TopLogits.on_student(found["top_ids"].long(), found["top_logprobs"], pairs, same, dst.offsets)


def _unread(teacher: Teacher, tokenizer: Any) -> AlignedTeacher:
    """A teacher of which nothing was read yet: a batch brings its own texts."""
    src, dst = (encode_texts(["0"], [Segmented(answer=".")], t) for t in (teacher.tokenizer, tokenizer))
    return AlignedTeacher(
        teacher.name,
        LiveRows(teacher.model, src, teacher.layers, 0, 1, teacher.hidden),
        src,
        dst,
        build_time_map(Arm().time, src, dst),
    )


def _weights_digest(model: nn.Module) -> str:
    """Of a model in memory."""
    found = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
