"""Every artefact's file, said once. Names may be Snakemake's wildcards: `items("{arm}", "{seed}")` is a rule's output.

No torch: this is imported while Snakemake parses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MANIFEST = "MANIFEST.json"
"""List of a model folder's files; it stands for a complete folder."""
INDEX = "index.json"
"""List of a store's shards; it stands for a complete store."""
HISTORY, COST, STUDENT = "history.jsonl", "cost.json", "model"
"""Of a trained cell: losses over the steps, what it took and came from, and its model folder."""
SPLITS = ("train", "validation", "test")
SOURCES = "sources.json"
"""Beside the splits: where their records come from and what was left out."""
ARMS, CONTRASTS, PAIRS = "arms.csv", "contrasts.csv", "pairs.csv"
"""Tables of statistics, of scores and of costs."""


FIGURES = (
    "effects", "ladder", "curves", "equal_time", "difficulty", "fusion", "router", "layers", "layer_loss", "fit", "alignment",
)  # fmt: skip
"""Of the report, each as SVG and as PDF."""
TABLES = ("arms", "results", "tasks", "ladder", "contrasts", "equal_time", "difficulty", "data", "cost")
"""Of the report, each as CSV and as LaTeX."""


@dataclass(frozen=True)
class Paths:
    """Every artefact under one results folder."""

    root: Path

    def model(self, name: str) -> Path:
        """Model folder."""
        return self.root / "models" / name

    def manifest(self, name: str) -> Path:
        """A model's list of files."""
        return self.model(name) / MANIFEST

    def data(self, split: str) -> Path:
        """Records of a split."""
        return self.root / "data" / f"{split}.parquet"

    @property
    def sources(self) -> Path:
        """Where the records come from and what was left out."""
        return self.root / "data" / SOURCES

    def teacher_text(self, teacher: str) -> Path:
        """Training records with the reasoning that a teacher has written."""
        return self.root / "teacher_text" / f"{teacher}.parquet"

    def text_counts(self, teacher: str) -> Path:
        """How many of its texts were right."""
        return self.root / "teacher_text" / f"{teacher}.json"

    def text_shard(self, teacher: str, shard: int | str) -> Path:
        """All texts that it has written for a part of the training split."""
        return self.root / "teacher_text" / teacher / f"shard-{shard:0>5}.jsonl"

    def records(self, model: str, split: str, reading: str) -> Path:
        """Records that a model reads. Nobody reads validation texts of a teacher's own: they have the reference."""
        return self.teacher_text(model) if (split, reading) == ("train", "written") else self.data(split)

    def encoding(self, model: str, split: str, reading: str) -> Path:
        """A split as a model's tokens, of one reading."""
        return self.root / "encoding" / model / f"{split}-{reading}.safetensors"

    def store(self, teacher: str, reading: str) -> Path:
        """Teacher KV store of one reading."""
        return self.root / "teacher_kv" / teacher / reading

    def store_index(self, teacher: str, reading: str) -> Path:
        """A store's list of shards."""
        return self.store(teacher, reading) / INDEX

    def shard(self, teacher: str, reading: str, shard: int | str) -> Path:
        """One shard of a store."""
        return self.store(teacher, reading) / f"shard-{shard:0>5}.safetensors"

    def layer_map(self, teacher: str) -> Path:
        """Similarity of layers."""
        return self.root / "layer_map" / f"{teacher}.json"

    def projector(self, fit: str) -> Path:
        """Fitted projectors."""
        return self.root / "projector" / f"{fit}.safetensors"

    def fit_report(self, fit: str) -> Path:
        """How well they fit."""
        return self.root / "projector" / f"{fit}.json"

    def cell(self, arm: str, seed: int | str) -> Path:
        """Folder of a trained cell."""
        return self.root / "train" / arm / f"seed{seed}"

    def student(self, arm: str, seed: int | str) -> Path:
        """Model folder of a trained cell."""
        return self.cell(arm, seed) / STUDENT

    def history(self, arm: str, seed: int | str) -> Path:
        """A cell's losses over the steps."""
        return self.cell(arm, seed) / HISTORY

    def cost(self, arm: str, seed: int | str) -> Path:
        """Time, memory and provenance of a cell."""
        return self.cell(arm, seed) / COST

    def checkpoints(self, arm: str, seed: int | str) -> Path:
        """Checkpoints of a cell: outside the declared outputs, which Snakemake deletes when a job fails."""
        return self.root / "checkpoints" / arm / f"seed{seed}"

    @property
    def trackers(self) -> Path:
        """What trackers such as TensorBoard write."""
        return self.root / "trackers"

    def items(self, arm: str, seed: int | str) -> Path:
        """Per-item scores of a cell."""
        return self.root / "evaluate" / arm / f"seed{seed}.parquet"

    @property
    def untrained(self) -> Path:
        """Per-item scores of the student before training."""
        return self.root / "evaluate" / "untrained.parquet"

    def lm_eval(self, arm: str, seed: int | str) -> Path:
        """Scores of a cell by lm-evaluation-harness."""
        return self.root / "lm_eval" / arm / f"seed{seed}.json"

    def teacher_quality(self, teacher: str) -> Path:
        """Per-item scores of a teacher."""
        return self.root / "teacher_quality" / f"{teacher}.parquet"

    def arm_table(self, arm: str) -> Path:
        """An arm over its seeds."""
        return self.root / "arms" / f"{arm}.csv"

    @property
    def stats(self) -> Path:
        """Statistics that are the same in every run."""
        return self.root / "stats"

    @property
    def costs(self) -> Path:
        """Measured time and memory, which are not."""
        return self.root / "cost"

    @property
    def tables(self) -> list[Path]:
        """All tables of statistics."""
        both = [folder / name for folder in (self.stats, self.costs) for name in (ARMS, CONTRASTS)]
        return [*both, self.stats / PAIRS]

    @property
    def audit(self) -> Path:
        """Findings of the fairness audit."""
        return self.root / "audit.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"

    @property
    def figures(self) -> Path:
        """The page's figures."""
        return self.root / "figures"

    @property
    def table_files(self) -> Path:
        """The page's tables."""
        return self.root / "tables"

    @property
    def doctor(self) -> Path:
        """Findings of the doctor."""
        return self.root / "doctor.json"

    @property
    def probe(self) -> Path:
        """What a probing job has seen on a node; its own files are in a folder of that name."""
        return self.root / "probe.json"

    @property
    def preflight(self) -> Path:
        """The small copy that `kvpipe preflight` measures, while it does."""
        return self.root / "preflight"

    def configuration(self, digest: str) -> Path:
        """The configuration that the jobs of a run read."""
        return self.root / "configs" / f"{digest}.json"

    @property
    def made_lock(self) -> Path:
        """Held by the process that makes artefacts outside of Snakemake."""
        return self.root / "made" / ".lock"

    def made(self, artefact: Path) -> Path:
        """What an artefact was made from."""
        return self.root / "made" / f"{artefact.relative_to(self.root)}.json"

    def log(self, job: str) -> Path:
        """What a job said, as `train/{arm}/seed{seed}`."""
        return self.root / "logs" / f"{job}.log"

    def benchmark(self, job: str) -> Path:
        """Time and memory of a job, by Snakemake."""
        return self.root / "benchmarks" / f"{job}.tsv"
