"""The doctor's extra for clusters: what Slurm, Apptainer and a Snakemake profile need, and the probe of a site."""

from __future__ import annotations

from kvpipe_cluster.container import check_container
from kvpipe_cluster.jobs import check_gpu, check_memory, check_packages, check_sandbox
from kvpipe_cluster.probing import probe
from kvpipe_cluster.slurm import check_slurm

__all__ = ["CHECKS", "probe"]

CHECKS = {
    "packages": check_packages,
    "slurm": check_slurm,
    "container": check_container,
    "gpu": check_gpu,
    "memory": check_memory,
    "sandbox": check_sandbox,
}
"""Added to those of `kvpipe.doctor`; on a login node those of the same name look at the jobs, not at the machine."""
