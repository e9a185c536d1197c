"""The table of steps: what each one reads, writes and depends on, and the function that runs it.

The Snakefile, use without Snakemake (`kvpipe.steps.make`) and the doctor read this table and no other. A file's name
is said in `paths`, what the arms imply in `plan`. No torch: this is imported while Snakemake parses.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from kvpipe.config import Arm, Config, FileData, HubData, LocalModel, PrunedModel, ScoringConfig
from kvpipe.config.terms import HiddenConfig
from kvpipe.experiment.paths import FIGURES, MANIFEST, SPLITS, TABLES, Paths
from kvpipe.experiment.plan import Dag

Job = dict[str, str]
"""The wildcards of one job of a step, as Snakemake has them: all are text."""
ENCODED = ("train", "validation")
"""Splits that are kept as tokens; the test split is read by the scorers alone."""
LM_EVAL = ("lm_eval_tasks", "lm_eval_folder", "lm_eval_limit")
"""Keys of `evaluate` that only the step `lm_eval` reads."""


class Step:
    """One step of an experiment. Its wildcards are the parameters of `makes`; `needs`, `sources` and `settings` have
    the same."""

    run: str
    """`module:function`, called with the loaders and the wildcards."""
    code = ""
    """The module whose code decides the result, with all that it imports; that of `run` by default."""
    remade = False
    """Whether `kvpipe train` makes it, and makes it again once it is stale; all others are made by Snakemake alone."""

    def __init__(self, dag: Dag, paths: Paths):
        self.dag, self.paths, self.config = dag, paths, dag.config

    def jobs(self) -> list[Job]:
        """The wildcards of every job that the experiment has."""
        return [{}]

    def makes(self, *_: Any, **wildcards: Any) -> dict[str, Path]:
        """What a job writes. The first file stands for all of it: where it is, the job was done."""
        raise NotImplementedError

    def needs(self, *_: Any, **wildcards: Any) -> list[Path]:
        """Earlier artefacts that a job reads."""
        return []

    def sources(self, *_: Any, **wildcards: Any) -> list[Path]:
        """The user's own files that a job reads."""
        return []

    def settings(self, *_: Any, **wildcards: Any) -> dict[str, Any]:
        """The part of the configuration that a job depends on; what its inputs say already is not repeated."""
        return {}

    @property
    def wildcards(self) -> list[str]:
        """Their names."""
        return list(signature(self.makes).parameters)

    @property
    def hashed(self) -> str:
        """The module that `kvpipe.experiment.provenance.code_hash` begins at."""
        return self.code or self.run.partition(":")[0]

    def depends(self, **job: str) -> str:
        """The settings as JSON: a param of Snakemake's."""
        return json.dumps(self.settings(**job), sort_keys=True)

    def files(self) -> list[Path]:
        """All that all jobs write."""
        return [path for job in self.jobs() for path in self.makes(**job).values()]

    # ------------------------------------------------------------ what several steps read
    def texts(self, model: str, reading: str = "student") -> list[Path]:
        """A model's training and validation texts as tokens."""
        return [self.paths.encoding(model, split, reading) for split in ENCODED]

    def of_arm(self, arm: Arm) -> list[Path]:
        """What a fit and a cell read of an arm: the student, its texts, and what is known of each teacher."""
        student = self.config.student
        found = [self.paths.manifest(student), self.paths.data("train"), *self.texts(student, arm.reading)]
        for teacher in arm.teachers:
            found += [self.paths.manifest(teacher), self.paths.encoding(teacher, "train", arm.time.text)]
            found += [self.paths.store_index(teacher, arm.time.text)] if self.dag.uses_store(arm) else []
            found += [self.paths.layer_map(teacher)] if self.dag.needs_layer_map(arm) else []
        return found

    def of_store(self, teacher: str, reading: str) -> list[Path]:
        """What a pass of a teacher reads: its texts, and what its layers are chosen by."""
        models = [self.paths.manifest(name) for name in (teacher, self.config.student)]
        mapped = [self.paths.layer_map(teacher)] if self.dag.store_needs_layer_map(teacher) else []
        return [*models, self.paths.encoding(teacher, "train", reading), *mapped]

    def of_cells(self, arms: Iterable[str]) -> list[Path]:
        """The scores, histories and costs of all cells of some arms."""
        kinds = (self.paths.items, self.paths.history, self.paths.cost)
        return [file(arm, seed) for arm in arms for seed in self.config.seeds for file in kinds]


# ---------------------------------------------------------------- inputs
class Data(Step):
    """The splits."""

    run, code, remade = "kvpipe.steps.data:make_data", "kvpipe.data.build", True

    def makes(self):
        return {split: self.paths.data(split) for split in SPLITS}

    def sources(self):
        found: set[Path] = set()
        for source in self.config.data.sources:
            if isinstance(source, FileData):
                named = (getattr(source, split) for split in SPLITS)
                found |= {source.parted(spec)[0] for spec in named if spec is not None}
            elif isinstance(source, HubData) and source.is_folder:
                found |= {path for path in Path(source.repo).rglob("*") if path.is_file()}
        return sorted(found)

    def settings(self):
        # n-grams decide what is dropped; where they only refuse, the audit counts them again
        unread = {"template", "context", "short"} | (set() if self.config.data.leakage == "drop" else {"ngram"})
        return self.config.data.model_dump(exclude=unread)


class Model(Step):
    """A model folder and its manifest."""

    run, remade = "kvpipe.steps.models:make_model", True

    def jobs(self):
        return [{"model": name} for name in self.config.models]

    def makes(self, model):
        return {"manifest": self.paths.manifest(model)}

    def needs(self, model):
        # a from-scratch student's tokenizer is trained on the training split, and layers are chosen on it
        read = self.config.models[model].source == "scratch" or self._is_chosen(model)
        split = [self.paths.data("train")] if read else []
        return [*map(self.paths.manifest, self.dag.model_needs(model)), *split]

    def sources(self, model):
        found = self.config.models[model]
        own = Path(found.path).iterdir() if isinstance(found, LocalModel) else ()
        return sorted(path for path in own if path.is_file() and path.name != MANIFEST)

    def _is_chosen(self, model: str) -> bool:
        """Whether its parts are chosen on texts."""
        found = self.config.models[model]
        return isinstance(found, PrunedModel) and found.reads_texts

    def settings(self, model):
        source = self.dag.model_source(model)
        data: dict[str, Any] = {"pretrain": Data(self.dag, self.paths).settings()}
        data["scratch"] = self.config.data.template.model_dump()
        data["pruned"] = data["scratch"] if self._is_chosen(model) else None
        return {"source": source, "data": data.get(source["source"])}


class Encode(Step):
    """The splits as a model's tokens, of every reading that some arm asks for."""

    run, remade = "kvpipe.steps.encode:make_encoding", True

    def jobs(self):
        pairs = dict.fromkeys(
            [
                (self.config.student, "student"),
                *((self.config.student, arm.reading) for arm in self.dag.arms.values()),
                *((teacher, "student") for teacher in self.dag.teachers),
                *((teacher, arm.time.text) for arm in self.dag.arms.values() for teacher in arm.teachers),
            ]
        )
        return [{"model": model, "reading": reading} for model, reading in pairs]

    def makes(self, model, reading):
        return {split: self.paths.encoding(model, split, reading) for split in ENCODED}

    def needs(self, model, reading):
        return [self.paths.manifest(model), *(self.paths.records(model, split, reading) for split in ENCODED)]

    def settings(self, model, reading):
        longest = self.config.train.max_length if model == self.config.student else None
        return {
            "template": self.config.data.template.model_dump(),
            "context": self.config.data.context,
            "max_length": longest,
        } | ({"short": self.config.data.short.model_dump()} if reading == "short" else {})


# ---------------------------------------------------------------- teachers
class TeacherText(Step):
    """The training records with a teacher's own reasoning. Where there is only one shard, its run writes that too."""

    run, remade = "kvpipe.steps.teacher_text:make_texts", True

    def jobs(self):
        arms = [arm for arm in self.dag.arms.values() if arm.time.text == "written"]
        return [{"teacher": teacher} for teacher in dict.fromkeys(t for arm in arms for t in arm.teachers)]

    def makes(self, teacher):
        return {"texts": self.paths.teacher_text(teacher), "counts": self.paths.text_counts(teacher)}

    def needs(self, teacher):
        shards = self.config.teacher_text.shards
        parts = [self.paths.text_shard(teacher, i) for i in range(shards)] if shards > 1 else []
        return [self.paths.manifest(teacher), self.paths.data("train"), *parts]

    def settings(self, teacher):
        scoring = of_scoring(self.config)["evaluate"]
        return {
            "teacher_text": self.config.teacher_text.model_dump(exclude={"batch_tokens", "min_kept"}),
            "scoring": {name: scoring[name] for name in ("tasks", "sandbox", *ScoringConfig.model_fields)},
            "template": self.config.data.template.model_dump(),
            "min_kept": self.config.teacher_text.min_kept,
            **self.dag.extensions,
        }


class TeacherTextShard(Step):
    """A teacher's texts for one of several parts of the training split."""

    run, remade = "kvpipe.steps.teacher_text:write_shard", True

    @property
    def whole(self) -> TeacherText:
        """What it is a part of."""
        return TeacherText(self.dag, self.paths)

    def jobs(self):
        shards = range(self.config.teacher_text.shards) if self.config.teacher_text.shards > 1 else ()
        return [{**job, "shard": str(number)} for job in self.whole.jobs() for number in shards]

    def makes(self, teacher, shard):
        return {"shard": self.paths.text_shard(teacher, shard)}

    def needs(self, teacher, shard):
        return [self.paths.manifest(teacher), self.paths.data("train")]

    def settings(self, teacher, shard):
        return {key: value for key, value in self.whole.settings(teacher).items() if key != "min_kept"}


class LayerMap(Step):
    """The similarity of the student's and a teacher's layers."""

    run, remade = "kvpipe.steps.layer_map:make_layer_map", True

    def jobs(self):
        return [{"teacher": teacher} for teacher in self.dag.teachers]

    def makes(self, teacher):
        return {"layers": self.paths.layer_map(teacher)}

    def needs(self, teacher):
        both = teacher, self.config.student
        return [*map(self.paths.manifest, both), *(file for model in both for file in self.texts(model))]

    def settings(self, teacher):
        return {
            "layer_map": self.config.layer_map.model_dump(),
            "train": self.config.train.model_dump(include={"batch_size", "learning_rate", "loss_on"}),
        }


class TeacherKV(Step):
    """A teacher's store: its list of shards. Where there is only one, its run makes that too."""

    run, remade = "kvpipe.steps.teacher_kv:make_store", True

    def jobs(self):
        arms = [arm for arm in self.dag.arms.values() if self.dag.uses_store(arm)]
        pairs = dict.fromkeys((teacher, arm.time.text) for arm in arms for teacher in arm.teachers)
        return [{"teacher": teacher, "reading": reading} for teacher, reading in pairs]

    def makes(self, teacher, reading):
        return {"store": self.paths.store_index(teacher, reading)}

    def needs(self, teacher, reading):
        shards = self.config.store.shards
        parts = [self.paths.shard(teacher, reading, i) for i in range(shards)] if shards > 1 else []
        return [*self.of_store(teacher, reading), *parts]

    def settings(self, teacher, reading):
        arms = [arm for arm in self.dag.arms.values() if teacher in arm.teachers and arm.time.text == reading]
        layers: Any = sorted({arm.layer.model_dump_json() for arm in arms})
        return {
            "store": self.config.store.model_dump(exclude={"budget_gb", "batch_size", "mode"}),
            # the layers follow from the arms' layer settings and the layer map (an input)
            "layers": layers if self.config.store.layers == "needed" else "all",
            "columns": sorted({column for arm in arms for column in arm.needs if not column.startswith("own_")}),
            "hidden": sorted({term.model_dump_json() for arm in arms for term in arm.of_kind(HiddenConfig)}),
        }


class TeacherKVShard(Step):
    """One of a store's several shards."""

    run, remade = "kvpipe.steps.teacher_kv:make_shard", True

    @property
    def whole(self) -> TeacherKV:
        """The store that it belongs to."""
        return TeacherKV(self.dag, self.paths)

    def jobs(self):
        shards = range(self.config.store.shards) if self.config.store.shards > 1 else ()
        return [{**store, "shard": str(number)} for store in self.whole.jobs() for number in shards]

    def makes(self, teacher, reading, shard):
        return {"shard": self.paths.shard(teacher, reading, shard)}

    def needs(self, teacher, reading, shard):
        return self.of_store(teacher, reading)

    def settings(self, teacher, reading, shard):
        return self.whole.settings(teacher, reading)


class Fit(Step):
    """The projectors of all arms that share a fit."""

    run, remade = "kvpipe.steps.fit:make_fit", True

    def jobs(self):
        return [{"fit": fit} for fit in self.dag.fits]

    def makes(self, fit):
        return {"projector": self.paths.projector(fit), "report": self.paths.fit_report(fit)}

    def needs(self, fit):
        arm, student = self.dag.fit_arm(fit), self.config.models[self.config.student]
        if student.source == "pruned" and arm.fit.basis == "whole":
            return [*self.of_arm(arm), self.paths.manifest(student.of)]
        return self.of_arm(arm)

    def settings(self, fit):
        return self.dag.fit_spec(self.dag.fit_arm(fit)) | self.dag.extensions


# ---------------------------------------------------------------- cells
class Cell(Step):
    """What is done with every arm under every seed."""

    def jobs(self):
        return [{"arm": arm, "seed": str(seed)} for arm, seed in self.dag.cells]


class Train(Cell):
    """One cell."""

    run = "kvpipe.steps.train:make_cell"

    def makes(self, arm, seed):
        return {
            "model": self.paths.student(arm, seed),
            "history": self.paths.history(arm, seed),
            "cost": self.paths.cost(arm, seed),
        }

    def needs(self, arm, seed):
        found = self.dag.arm(arm)
        fit = [self.paths.projector(self.dag.fit_id(found))] if self.dag.needs_fit(found) else []
        return [*self.of_arm(found), self.paths.data("validation"), *fit]

    def settings(self, arm, seed=""):
        found = self.dag.arm(arm)
        unread = {"device", "threads", "shard", "checkpoint_every", "hold_targets_gb", "report_to"}
        return {
            "arm": found.model_dump(exclude={"role", "label"}),
            "train": self.config.train.model_dump(exclude=unread),
            "template": self.config.data.template.model_dump(),
            "store_mode": self.config.store.mode if found.teachers else None,
            **self.dag.extensions,
        }


class Evaluate(Cell):
    """Per-item scores of a cell."""

    run, code = "kvpipe.steps.evaluate:score_folder", "kvpipe.evaluate.score"

    def makes(self, arm, seed):
        return {"scores": self.paths.items(arm, seed)}

    def needs(self, arm, seed):
        swap, read = self.config.evaluate.cache_swap, []
        if swap is not None:
            read = [*self.of_arm(self.dag.arm(swap)), self.paths.projector(self.dag.fit_id(self.dag.arm(swap)))]
        return [self.paths.student(arm, seed), self.paths.data("test"), *read]

    def settings(self, arm, seed):
        swap = self.config.evaluate.cache_swap
        found = of_scoring(self.config) | ({} if swap is None else {"fit": self.dag.fit_spec(self.dag.arm(swap))})
        short = {"short": self.config.data.short.model_dump()}
        return found | (short if self.dag.arm(arm).reading == "short" else {})


class LMEval(Cell):
    """Scores of a cell by lm-evaluation-harness, where tasks are configured."""

    run, code = "kvpipe.steps.evaluate:score_tasks", "kvpipe.evaluate.harness"

    def jobs(self):
        return super().jobs() if self.config.evaluate.lm_eval_tasks else []

    def makes(self, arm, seed):
        return {"scores": self.paths.lm_eval(arm, seed)}

    def needs(self, arm, seed):
        return [self.paths.student(arm, seed)]

    def settings(self, arm, seed):
        return self.config.evaluate.model_dump(include=set(LM_EVAL))


class TeacherQuality(Step):
    """Per-item scores of a teacher whose weights mean something."""

    run, code = Evaluate.run, Evaluate.code

    def jobs(self):
        return [{"teacher": teacher} for teacher in self.dag.judged_teachers]

    def makes(self, teacher):
        return {"scores": self.paths.teacher_quality(teacher)}

    def needs(self, teacher):
        return [self.paths.manifest(teacher), self.paths.data("test")]

    def settings(self, teacher):
        return of_scoring(self.config)


class Untrained(Step):
    """Per-item scores of the student before training."""

    run, code = "kvpipe.steps.evaluate:score_untrained", Evaluate.code

    def makes(self):
        return {"scores": self.paths.untrained}

    def needs(self):
        return [self.paths.manifest(self.config.student), self.paths.data("test")]

    def settings(self):
        return {**of_scoring(self.config), "seed": self.config.seeds[0]}


def of_scoring(config: Config) -> dict[str, Any]:
    """The settings that per-item scores depend on."""
    unread: Any = {"batch_size": True, "sandbox": {"workers"}, **dict.fromkeys(LM_EVAL, True)}
    return {"evaluate": config.evaluate.model_dump(exclude=unread), "template": config.data.template.model_dump()}


# ---------------------------------------------------------------- results
class ArmTable(Step):
    """An arm over its seeds."""

    run = "kvpipe.stats.tables:write_arm_table"

    def jobs(self):
        return [{"arm": arm} for arm in self.dag.arms]

    def makes(self, arm):
        return {"table": self.paths.arm_table(arm)}

    def needs(self, arm):
        return self.of_cells([arm])

    def settings(self, arm):
        return {"seeds": self.config.seeds}


class Audit(Step):
    """Whether arms are compared like with like."""

    run = "kvpipe.stats.audit:audit"

    def makes(self):
        return {"findings": self.paths.audit}

    def needs(self):
        return [*self.of_cells(self.dag.arms), self.paths.data("train"), self.paths.data("test")]

    def settings(self):
        config = self.config
        return {"audit": config.audit.model_dump(), "ngram": config.data.ngram, "seeds": config.seeds}


class Stats(Step):
    """The tables of statistics."""

    run = "kvpipe.stats.tables:write_stats"

    def makes(self):
        return {f"{path.parent.name}_{path.stem}": path for path in self.paths.tables}

    def needs(self):
        return [self.paths.untrained, *self.of_cells(self.dag.arms)]

    def settings(self):
        # what families are made of
        arms = {name: (arm.role, self.config.arms[name].base) for name, arm in self.dag.arms.items()}
        stats = {"stats": self.config.stats.model_dump(), "arms": arms, "seeds": self.config.seeds}
        return stats | self.dag.extensions


class Page(Step):
    """The page."""

    run = "kvpipe.report.render:write_report"

    def makes(self):
        drawn = {f"{name}_{kind}": self.paths.figures / f"{name}.{kind}" for name in FIGURES for kind in ("svg", "pdf")}
        written = {
            f"{name}_{kind}": self.paths.table_files / f"{name}.{kind}" for name in TABLES for kind in ("csv", "tex")
        }
        return {
            "page": self.paths.report,
            **{f"figure_{k}": v for k, v in drawn.items()},
            **{f"table_{k}": v for k, v in written.items()},
        }

    def needs(self):
        found = [*self.paths.tables, self.paths.audit, *self.of_cells(self.dag.arms)]
        for step in (ArmTable, LMEval, TeacherQuality, TeacherText):
            found += step(self.dag, self.paths).files()
        maps = [self.paths.layer_map(teacher) for teacher in self.dag.mapped_teachers]
        return [*found, *map(self.paths.fit_report, self.dag.fits), *maps]

    def settings(self):
        arms = {name: arm.model_dump() for name, arm in self.dag.arms.items()}
        return {"title": self.config.title, "arms": arms, "seeds": self.config.seeds}


STEPS: dict[str, type[Step]] = {
    "data": Data,
    "model": Model,
    "teacher_text_shard": TeacherTextShard,
    "teacher_text": TeacherText,
    "encode": Encode,
    "layer_map": LayerMap,
    "teacher_kv_shard": TeacherKVShard,
    "teacher_kv": TeacherKV,
    "fit": Fit,
    "train": Train,
    "evaluate": Evaluate,
    "lm_eval": LMEval,
    "teacher_quality": TeacherQuality,
    "untrained": Untrained,
    "arm": ArmTable,
    "audit": Audit,
    "stats": Stats,
    "report": Page,
}
"""Every step by the name of its rule, in the order of the chain."""


def in_order(steps: Mapping[str, Step], files: Iterable[Path], given: Container[Path] = ()) -> list[tuple[str, Job]]:
    """The jobs that make files and all that these are made from, each after those that it needs.

    Args:
        steps: the table.
        files: artefacts of steps that are `remade`.
        given: files that are there already, whatever makes them.

    Raises:
        KeyError: no such step makes a file.
    """
    makers = {
        path: (name, job)
        for name, step in steps.items()
        if step.remade
        for job in step.jobs()
        for path in step.makes(**job).values()
    }
    found: dict[tuple[str, ...], tuple[str, Job]] = {}

    def bring(path: Path) -> None:
        if path in given:
            return
        name, job = makers[path]
        key = (name, *job.values())
        if key not in found:
            for need in steps[name].needs(**job):
                bring(need)
            found[key] = (name, job)

    for path in files:
        bring(path)
    return list(found.values())


def table(dag: Dag, paths: Paths) -> dict[str, Step]:
    """The steps of one experiment."""
    return {name: step(dag, paths) for name, step in STEPS.items()}
