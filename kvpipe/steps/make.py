"""Run steps of the table without Snakemake: one alone, or all that a file is made from where it is missing or stale."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from kvpipe.config import Config, ConfigError
from kvpipe.experiment import made
from kvpipe.experiment.files import alone
from kvpipe.experiment.launch import group_size
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import in_order, table


class Work:
    """One experiment and its table of steps; `Inputs` loads what they have made, and takes seconds to import."""

    def __init__(self, config: Config, paths: Paths):
        self.config, self.paths, self.dag = config, paths, Dag(config)
        self.steps = table(self.dag, paths)


def run(inputs: Work, name: str, **job: str) -> None:
    """Run one job of a step, and note what its files were made from."""
    step = inputs.steps[name]
    module, _, function = step.run.partition(":")
    getattr(import_module(module), function)(inputs, **job)
    made.note(step, **job)


def make(inputs: Work, files: Iterable[Path], log=print) -> None:
    """Make files, and first what each is made from, where they are missing or were made from something else than now.

    Settings, code and the content of every input are compared, those of the user's own files too.

    Args:
        inputs: the loaders.
        files: artefacts of steps that are `remade`.
        log: takes a line for each job.

    Raises:
        ConfigError: something is to be made, and this is one of several processes.
    """
    for name, job in in_order(inputs.steps, files):
        step = inputs.steps[name]
        differs = made.changed(step, **job)
        if differs == []:
            continue
        again = f" (again: changed since it was made: {', '.join(differs)})" if differs else ""
        if group_size(os.environ) > 1:
            raise ConfigError(
                f"{' '.join([name, *job.values()])} is missing or was made from something else, and the processes of a "
                "group would all make it: run `kvpipe prepare` with this arm in one process first"
            )
        log(f"{' '.join([name, *job.values()])} …{again}")
        with alone(inputs.paths.made_lock, "another process makes artefacts here", log):
            if made.changed(step, **job) != []:  # else that one has made it
                run(inputs, name, **job)
