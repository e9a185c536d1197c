"""How a job starts: the image that it runs in, and the command line that its resources ask for.

No torch: this is imported while Snakemake parses.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ONE_PROCESS = "python -m kvpipe"
EACH_NODE = 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"'
"""Run by srun once on every node, where alone its rank is known."""
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Set by torchrun and by accelerate for each of several processes."""
PORT = "$((20000 + SLURM_JOB_ID % 20000))"
"""Rendezvous port of a job on several nodes, derived from the job id."""


def in_job() -> bool:
    """Whether this process runs in a job or in an image, which show little of the machine around them."""
    return any(name in os.environ for name in ("SLURM_JOB_ID", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"))


def image_path(named: str) -> str:
    """The image, followed one link: Snakemake tracks an image by its path, which is to change with its content."""
    path = Path(named)
    return str(path.parent / path.readlink()) if path.is_symlink() else named


def image_digest(path: str) -> str | None:
    """`sha256:…` of an image from the file that `make image` writes beside it; None where there is none."""
    beside = Path(f"{path}.sha256")
    return f"sha256:{beside.read_text(encoding='ascii').split()[0]}" if beside.is_file() else None


def processes(resources: Mapping[str, Any]) -> tuple[int, int]:
    """GPUs over all nodes, and nodes, that a job's resources ask for.

    `gpu` counts those of the whole job (sbatch --gpus); `gres: gpu:4` and `gres: gpu:TYPE:4` those of every node.

    Raises:
        ValueError: the GPUs do not divide by the nodes; accelerate needs the same number on each.
    """
    nodes = int(resources.get("nodes") or 1)
    kind, *rest = str(resources.get("gres") or "").split(":")
    each = int(rest[-1]) if rest and rest[-1].isdigit() else 1
    gpus = nodes * each if kind == "gpu" else int(resources.get("gpu") or 0)
    if gpus % nodes or (nodes > 1 and not gpus):
        raise ValueError(
            f"{gpus} GPUs on {nodes} nodes: every node needs the same number; in the profile "
            f"gres: gpu:{-(-gpus // nodes) or 1}, which counts those of a node, in place of gpu, with nodes: {nodes}"
        )
    return gpus, nodes


def missing_lines(resources: Mapping[str, Any]) -> list[str]:
    """Lines that the profile lacks for a cell on several nodes, whose job calls srun itself.

    Without `mpi` the executor plugin starts the job by an srun of its own, and the one inside waits for ever for the
    GPUs that the outer holds. `tasks` is what the plugin demands beside it, and it makes --ntasks-per-gpu of it unless
    `tasks_per_gpu` says otherwise.
    """
    nodes = int(resources.get("nodes") or 1)
    needed = {
        "mpi: srun": resources.get("mpi"),
        f"tasks: {nodes}": resources.get("tasks") or resources.get("tasks_per_node"),
        "tasks_per_gpu: 0": resources.get("tasks_per_gpu") is not None,
    }
    return [line for line, there in needed.items() if nodes > 1 and not there]


def check_nodes(resources: Mapping[str, Any]) -> None:
    """Refuse a cell on several nodes that would wait for ever.

    Raises:
        ValueError: lines are missing in the profile; the message has them.
    """
    if lines := missing_lines(resources):
        raise ValueError(
            f"a cell on {resources['nodes']} nodes calls srun itself, which would wait for ever for the GPUs of the "
            f"srun around it; add to set-resources: train: in the profile: {', '.join(lines)}"
        )


def group_size(environment: Mapping[str, str]) -> int:
    """How many processes a launcher has started, this one among them.

    Raises:
        ValueError: what `check_environment` refuses.
    """
    check_environment(environment)
    return int(environment.get("WORLD_SIZE") or "1")


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse the variables of another job's launcher: this process would wait for ever for the other ones.

    Raises:
        ValueError: several processes are said, and not all that a launcher says of them; or a number is none.
    """
    for name in set(LAUNCHER) - {"MASTER_ADDR"}:
        if not (environment.get(name) or "0").removeprefix("-").isdecimal():
            raise ValueError(stray_variables(environment, f"{name} is no number"))
    several = environment.get("WORLD_SIZE", "") not in ("", "1") or environment.get("LOCAL_RANK", "") not in ("", "-1")
    absent = [name for name in LAUNCHER if not environment.get(name)]
    if several and absent:
        raise ValueError(stray_variables(environment, f"no {', '.join(absent)}"))


def stray_variables(environment: Mapping[str, str], problem: str) -> str:
    """The message for a process whose launcher's variables promise others that are not there."""
    said = [name for name in LAUNCHER if environment.get(name)]
    return (
        f"the environment has {', '.join(f'{name}={environment[name]}' for name in said)}, and {problem}: variables of "
        f"another job's launcher? Unset them (env -u {' -u '.join(said)} …), or start several processes by accelerate "
        "launch --module kvpipe train …"
    )


def command(gpus: int, nodes: int = 1, container: str = "") -> str:
    """What stands before the subcommand: one process, one per GPU of a node, or one per GPU of several nodes.

    Args:
        gpus: GPUs over all nodes.
        nodes: nodes.
        container: what starts the image on each node, for several nodes: srun is not inside the image, so there the
            job's own command runs outside of it.
    """
    if gpus <= 1:
        return ONE_PROCESS
    shared = f"--multi_gpu --num_machines {nodes} --num_processes {gpus} --mixed_precision no --dynamo_backend no"
    if nodes == 1:
        # two cells may share a node: a free port for each
        return f"accelerate launch {shared} --main_process_port 0 --module kvpipe"
    inside = f"{container} bash" if container else "bash"
    return (
        f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 {inside} -c {shlex.quote(EACH_NODE)} node {shared}"
        f" --main_process_ip $(hostname) --main_process_port {PORT} --module kvpipe"
    )
