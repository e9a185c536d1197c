"""How large the experiment is before anything of it exists: shapes of the models, tokens of the texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from kvpipe.config import (
    Config,
    EmbeddedData,
    FileData,
    HubData,
    HubModel,
    Loading,
    LocalModel,
    PretrainModel,
    RandomModel,
    ScratchModel,
)
from kvpipe.doctor.sources import data_files
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.sizes import Shape, count_parameters, estimate_bytes, shape, teacher_pass_bytes

SAMPLE = 100
"""Records of a file that are read for the mean length of its texts."""
BYTES_PER_TOKEN = 3.5
"""Of English text and code under tokenizers of tens of thousands of tokens."""
QUANTIZED = {"int8": 1.0, "int4": 0.5}
"""Bytes of a weight."""
MARKS = "\n#### "
"""A text is about its segments and the template's marks."""
SMALL_VOCABULARY, BYTES_PER_SMALL_TOKEN = 2000, 1.7
"""Vocabularies like those of the embedded models cut texts into shorter pieces."""


@dataclass(frozen=True)
class Workload:
    """Sizes that follow from a configuration, as far as they can be known."""

    config: Config
    paths: Paths

    @cached_property
    def dag(self) -> Dag:
        """The configuration's artefacts."""
        return Dag(self.config)

    def folder(self, name: str) -> Path | None:
        """Where a model's files are on this machine; None while they are not."""
        model = self.config.models[name]
        folders = [self.paths.model(name)]
        if isinstance(model, LocalModel):
            folders.append(Path(model.path))
        elif isinstance(model, HubModel):
            cached = _cached_config(model)
            folders += [cached.parent] if cached else []
        return next((folder for folder in folders if (folder / "config.json").is_file()), None)

    def shape(self, name: str) -> Shape | None:
        """A model's shape; None while its config.json is not on this machine."""
        model, folder = self.config.models[name], self.folder(name)
        if isinstance(model, RandomModel):
            return self.shape(model.like)
        if folder is not None:
            try:
                values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                return shape(values, parameters=count_parameters(folder))
            except (OSError, ValueError):  # damaged: a finding of its own
                return None
        recipe: Any = (
            model if isinstance(model, ScratchModel) else model.recipe if isinstance(model, PretrainModel) else None
        )
        return None if recipe is None else shape(recipe.architecture, vocab=recipe.tokenizer.vocab_size)

    @cached_property
    def examples(self) -> int:
        """Training examples."""
        return sum(count for count, _, _ in self._sources)

    @property
    def unread(self) -> list[str]:
        """Data sets of the hub that the data step has not fetched yet: nothing is known of their size."""
        hub = [source.repo for source in self.config.data.sources if isinstance(source, HubData) and source.train]
        return [] if self.paths.data("train").is_file() else hub

    @cached_property
    def _sources(self) -> list[tuple[int, float, dict[str, list[str]]]]:
        written = self.paths.data("train")
        if written.is_file() and any(isinstance(source, HubData) for source in self.config.data.sources):
            return [_written(written)]
        return [_sampled(source) for source in self.config.data.sources]

    def tokens(self, name: str, reading: str = "student") -> int:
        """About how many tokens the training split has under a model's tokenizer: counted on a sample where both are
        here, else by the bytes."""
        model = self.config.models[name]
        folder = self.folder(model.like if isinstance(model, RandomModel) else name)
        tokenizer = _tokenizer(folder) if folder is not None else None
        found = self.shape(name)
        small = found is not None and found.vocab < SMALL_VOCABULARY
        total = 0.0
        for count, difficulty, samples in self._sources:
            texts = samples[reading]
            if texts and tokenizer is not None:
                mean = sum(len(tokenizer.encode(text).ids) for text in texts) / len(texts)
            else:
                # the embedded tasks' mean bytes, as measured
                bytes_each = 30 + 19 * difficulty if reading == "student" else 50 + 33 * difficulty
                if texts:
                    bytes_each = sum(len(text.encode()) for text in texts) / len(texts)
                mean = bytes_each / (BYTES_PER_SMALL_TOKEN if small else BYTES_PER_TOKEN)
            total += count * (mean + 1)
        return round(total)

    def stored_layers(self, teacher: str) -> int:
        """At most how many layers a store of this teacher keeps."""
        theirs, student = self.shape(teacher), self.shape(self.config.student)
        assert theirs is not None
        arms = [arm for arm in self.dag.arms.values() if teacher in arm.teachers]
        measured = any(arm.layer.kind == "cka" for arm in arms)  # any layer may turn out similar
        if self.config.store.layers == "all" or measured or student is None:
            return theirs.layers
        return min(theirs.layers, student.layers + any(arm.loss.kind == "relation" for arm in arms))

    @property
    def stores(self) -> list[tuple[str, str]]:
        """(teacher, reading) of every store that some arm reads."""
        arms = [arm for arm in self.dag.arms.values() if self.dag.uses_store(arm)]
        return list(dict.fromkeys((teacher, arm.time.text) for arm in arms for teacher in arm.teachers))

    def store_bytes(self, teacher: str, reading: str) -> int | None:
        """Estimated bytes of one store; None while the teacher's shape or the data is unknown."""
        found = self.shape(teacher)
        if found is None or not self.examples:
            return None
        rows, config = self.tokens(teacher, reading), self.config.store
        return estimate_bytes(config, found.geometry, self.stored_layers(teacher), rows, config.top_logits)

    def loading(self, name: str) -> Loading:
        """How a model's weights are loaded."""
        model = self.config.models[name]
        model = self.config.models[model.like] if isinstance(model, RandomModel) else model
        return getattr(model, "load", Loading())

    def pass_bytes(self, teacher: str, reading: str, on_gpu: bool = False) -> int | None:
        """Estimated host memory of building one shard of a store, or the GPU's, where the shard is not kept; None while
        the teacher's shape or the data is unknown."""
        found = self.shape(teacher)
        if found is None or not self.examples:
            return None
        rows = self.tokens(teacher, reading)
        at_once = round(1.5 * rows / self.examples) * min(self.config.store.batch_size, self.examples)
        load = self.loading(teacher)
        # weights arrive in the host's memory before they are quantized
        width = QUANTIZED.get(load.quantize if on_gpu else "none", 4.0 if load.dtype == "fp32" else 2.0)
        kept = 0 if on_gpu else rows // self.config.store.shards
        return teacher_pass_bytes(found, self.stored_layers(teacher), kept, at_once, width)


def _cached_config(model: HubModel) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(model.repo, "config.json", revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def _tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder, by the Rust library alone."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    file = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file)) if file.is_file() else None
    except Exception:  # a damaged file: the Rust library raises nothing narrower
        return None


def _sampled(source: EmbeddedData | FileData | HubData) -> tuple[int, float, dict[str, list[str]]]:
    """Examples of the training split, the embedded tasks' difficulty, and some texts for each reading.

    Nothing of a data set on the hub is known before the data step has fetched it.
    """
    if isinstance(source, EmbeddedData):
        return source.train, float(source.difficulty), {"student": [], "own": []}
    path = None if isinstance(source, HubData) else data_files(source).get("train")
    if path is None or not path.is_file():
        return 0, 0.0, {"student": [], "own": []}
    try:
        from kvpipe.data.mapping import to_record
    except ImportError:  # a login node without pyarrow: lines can be counted all the same
        return (0 if path.suffix == ".parquet" else _sample(path)[0]), 0.0, {"student": [], "own": []}

    count, rows = _sample(path)
    try:
        records = [to_record(row, source, str(number)) for number, row in enumerate(rows)]
    except ValueError:  # the data step names the row
        records = []
    return count, 0.0, _texts(records)


def _written(path: Path) -> tuple[int, float, dict[str, list[str]]]:
    """The same of the split that the data step wrote; texts from all over it, since its tasks stand one after the other."""
    try:
        from kvpipe.data.records import read_records
    except ImportError:
        return 0, 0.0, {"student": [], "own": []}
    records = read_records(path)
    return len(records), 0.0, _texts(records[:: max(1, len(records) // SAMPLE)])


def _texts(records: list[Any]) -> dict[str, list[str]]:
    return {
        "student": ["\n".join((r.prompt, r.reasoning, r.answer)) + MARKS for r in records],
        "own": ["\n".join((r.prompt, r.teacher_reasoning or r.reasoning, r.answer)) + MARKS for r in records],
    }


def _sample(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """Number of records in a file and its first ones."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        first = next(file.iter_batches(SAMPLE), None)
        return file.metadata.num_rows, [] if first is None else first.to_pylist()
    with path.open(encoding="utf-8") as handle:
        head = list(islice(handle, SAMPLE))
        count = len(head) + sum(1 for line in handle if line.strip())
    try:
        return count, [row for line in head if line.strip() and isinstance(row := json.loads(line), dict)]
    except json.JSONDecodeError:
        return count, []  # the data step names the line
