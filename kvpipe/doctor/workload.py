"""How large the experiment is before anything of it exists: shapes of the models, tokens of the texts."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from kvpipe.config import (
    Config,
    EmbeddedData,
    FileData,
    HubData,
    HubModel,
    Loading,
    LocalModel,
    PrunedModel,
    RandomModel,
    Reading,
    ScratchModel,
)
from kvpipe.config.terms import NATS
from kvpipe.experiment.paths import SPLITS, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.sizes import Shape, count_parameters, estimate_bytes, shape, teacher_pass_bytes
from kvpipe.experiment.steps import TeacherKV
from kvpipe.models.headers import read_config
from kvpipe.models.hub import candidates, missing_bytes

SAMPLE = 100
"""Records of a file that are read for the mean length of its texts."""
BYTES_PER_TOKEN = 3.5
"""Of English text and code under tokenizers of tens of thousands of tokens."""
QUANTIZED = {"int8": 1.0, "int4": 0.5}
"""Bytes of a weight."""
SMALL_VOCABULARY, BYTES_PER_SMALL_TOKEN = 2000, 1.7
"""Vocabularies like those of the embedded models cut texts into shorter pieces."""


class Sample(NamedTuple):
    """A part of the training split: how many examples, the embedded tasks' difficulty, some of the records."""

    examples: int
    difficulty: float = 0.0
    records: list[Any] = []  # noqa: RUF012 - read only


@dataclass(frozen=True)
class Workload:
    """What is examined: a configuration, and the sizes that follow from it as far as they can be known."""

    config: Config
    paths: Paths
    profile: Path | None = None
    """Snakemake profile that its jobs run by."""

    @cached_property
    def dag(self) -> Dag:
        """The configuration's artefacts."""
        return Dag(self.config)

    def folder(self, name: str) -> Path | None:
        """Where a model's files are on this machine; None while they are not."""
        model = self.config.models[name]
        copy = self.copy_of(model) if isinstance(model, HubModel) else None
        copy = Path(model.path) if isinstance(model, LocalModel) else copy
        folders = (self.paths.model(name), copy)
        return next((folder for folder in folders if folder and (folder / "config.json").is_file()), None)

    def copy_of(self, model: HubModel) -> Path | None:
        """A complete copy of a locked model in a library or the machine's cache, by the sizes of its files: reading them
        takes minutes, and `kvpipe models` does."""
        pinned = self.config.lock.get(model.pin)
        if pinned is None:
            return None
        folders = candidates(model.repo, pinned, self.config.libraries)
        try:
            return next((folder for folder in folders if not missing_bytes(folder, pinned.files)), None)
        except ModuleNotFoundError:  # a login node may lack huggingface_hub, which knows where the cache is
            return None

    def shape(self, name: str) -> Shape | None:
        """A model's shape; None while its config.json is not on this machine."""
        model, folder = self.config.models[name], self.folder(name)
        if isinstance(model, RandomModel):
            return self.shape(model.like)
        if isinstance(model, PrunedModel) and folder is None:
            whole = self.shape(model.of)
            kept = model.keep or len(model.layers or ())
            if whole is None:
                return None
            embedded = whole.vocab * whole.hidden
            left = embedded + (whole.parameters - embedded) * kept // whole.layers
            return replace(whole, layers=kept, parameters=left)
        if folder is not None:
            try:
                return shape(read_config(folder), parameters=count_parameters(folder))
            except (OSError, ValueError):  # damaged: a finding of its own
                return None
        recipe = model if isinstance(model, ScratchModel) else getattr(model, "recipe", None)
        return None if recipe is None else shape(recipe.architecture, vocab=recipe.tokenizer.vocab_size)

    @property
    def examples(self) -> int:
        """Training examples."""
        return sum(source.examples for source in self._sources)

    @property
    def unread(self) -> list[str]:
        """Data sets of the hub that the data step has not fetched yet: nothing is known of their size."""
        hub = [source.repo for source in self.config.data.sources if isinstance(source, HubData) and source.train]
        return [] if self.paths.data("train").is_file() else hub

    @cached_property
    def _sources(self) -> list[Sample]:
        written, sources = self.paths.data("train"), self.config.data.sources
        if written.is_file() and any(isinstance(source, HubData) for source in sources):
            return [_written(written)]
        return [_sampled(source) for source in sources]

    def tokens(self, name: str, reading: Reading = "student") -> int:
        """About how many tokens the training split has under a model's tokenizer: counted on a sample where both are
        here, else by the bytes."""
        model = self.config.models[name]
        folder = self.folder(model.like if isinstance(model, RandomModel) else name)
        tokenizer, shape = _tokenizer(folder) if folder is not None else None, self.shape(name)
        small = shape is not None and shape.vocab < SMALL_VOCABULARY
        total = 0.0
        for source in self._sources:
            texts = [self._text(record, reading) for record in source.records]
            if texts and tokenizer is not None:
                mean = sum(len(tokenizer.encode(text).ids) for text in texts) / len(texts)
            else:
                # the embedded tasks' mean bytes, as measured
                bytes_each = 30 + 19 * source.difficulty if reading == "student" else 50 + 33 * source.difficulty
                if texts:
                    bytes_each = sum(len(text.encode()) for text in texts) / len(texts)
                mean = bytes_each / (BYTES_PER_SMALL_TOKEN if small else BYTES_PER_TOKEN)
            total += source.examples * (mean + 1)
        return round(total)

    def longest(self, name: str, reading: Reading = "student") -> int:
        """About how many tokens the longest text of a batch has, to which the others are padded: it is not known before
        all are tokenized."""
        mean = self.tokens(name, reading) / max(1, self.examples)
        return min(self.config.train.max_length, round(1.5 * mean) or self.config.train.max_length)

    def _text(self, record: Any, reading: Reading) -> str:
        from kvpipe.data.records import read_as, render

        record = replace(record, teacher_reasoning=record.teacher_reasoning or record.reasoning)
        return render(read_as([record], "own" if reading == "written" else reading)[0], self.config.data.template).text

    def stored_layers(self, teacher: str) -> int:
        """At most how many layers a store of this teacher keeps."""
        theirs, student = self.shape(teacher), self.shape(self.config.student)
        assert theirs is not None
        arms = [arm for arm in self.dag.arms.values() if teacher in arm.teachers]
        measured = any(arm.layer.kind == "cka" for arm in arms)  # any layer may turn out similar
        if self.config.store.layers == "all" or measured or student is None:
            return theirs.layers
        return min(theirs.layers, student.layers + any("keys" in arm.needs for arm in arms))

    @property
    def missing_stores(self) -> list[tuple[str, Reading]]:
        """(teacher, reading) of every store that some arm reads and that is not made yet."""
        jobs = TeacherKV(self.dag, self.paths).jobs()
        stores = [(job["teacher"], job["reading"]) for job in jobs]
        return [pair for pair in stores if not self.paths.store_index(*pair).is_file()]

    def store_bytes(self, teacher: str, reading: Reading) -> int | None:
        """Estimated bytes of one store; None while the teacher's shape or the data is unknown."""
        found = self.shape(teacher)
        if found is None or not self.examples:
            return None
        rows, config, needs = self.tokens(teacher, reading), self.config.store, self.dag.store_needs(teacher, reading)
        states, top = found.hidden * len(needs & {"states", "hidden"}), config.top_logits * ("top_logits" in needs)
        return estimate_bytes(config, found.geometry, self.stored_layers(teacher), rows, top, states)

    def loading(self, name: str) -> Loading:
        """How a model's weights are loaded."""
        model = self.config.models[name]
        model = self.config.models[model.like] if isinstance(model, RandomModel) else model
        return getattr(model, "load", Loading())

    def pass_bytes(self, teacher: str, reading: Reading, on_gpu: bool = False) -> int | None:
        """Estimated host memory of building one shard of a store, or the GPU's; None while the teacher's shape or the data
        is unknown."""
        found = self.shape(teacher)
        if found is None or not self.examples:
            return None
        load = self.loading(teacher)
        # weights arrive in the host's memory before they are quantized
        width = QUANTIZED.get(load.quantize if on_gpu else "none", 4.0 if load.dtype == "fp32" else 2.0)
        head = bool(self.dag.store_needs(teacher, reading) & (NATS | {"top_logits"}))
        layers, longest = self.stored_layers(teacher), self.longest(teacher, reading)
        return round(teacher_pass_bytes(found, layers, longest, width, on_gpu, head=head))


def data_files(source: FileData) -> dict[str, Path]:
    """Split → the file that it is read from."""
    named = {split: getattr(source, split) for split in SPLITS}
    return {split: source.parted(spec)[0] for split, spec in named.items() if spec is not None}


def _tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder, by the Rust library alone; None where it cannot be read."""
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # not there, or damaged: the Rust library raises nothing narrower
        return None


def _sampled(source: EmbeddedData | FileData | HubData) -> Sample:
    """The training split of a source. Nothing of a data set on the hub is known before the data step has fetched it."""
    if isinstance(source, EmbeddedData):
        return Sample(source.train, source.difficulty)
    path = None if isinstance(source, HubData) else data_files(source).get("train")
    if path is None or not path.is_file():
        return Sample(0)
    try:
        from kvpipe.data.mapping import to_record
    except ImportError:  # a login node without pyarrow: lines can be counted all the same
        return Sample(0 if path.suffix == ".parquet" else _head(path)[0])
    count, rows = _head(path)
    records = []
    for number, row in enumerate(rows):
        with suppress(ValueError):  # a row that is left out, or that the data step names
            records.append(to_record(row, source, str(number)))
    return Sample(count, 0.0, records)


def _written(path: Path) -> Sample:
    """The split that the data step wrote; records from all over it, since its tasks stand one after the other."""
    try:
        from kvpipe.data.records import read_records
    except ImportError:
        return Sample(0)
    records = read_records(path)
    return Sample(len(records), 0.0, records[:: max(1, len(records) // SAMPLE)])


def _head(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Number of rows in a file and its first ones."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        first = next(file.iter_batches(SAMPLE), None)
        return file.metadata.num_rows, [] if first is None else first.to_pylist()
    with path.open(encoding="utf-8") as lines:
        written = (line for line in lines if line.strip())
        first_lines = list(islice(written, SAMPLE))
        count = len(first_lines) + sum(1 for _ in written)
    try:
        return count, [row for line in first_lines if isinstance(row := json.loads(line), dict)]
    except json.JSONDecodeError:
        return count, []  # the data step names the line
