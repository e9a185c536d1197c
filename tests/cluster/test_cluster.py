"""The DAG on a real SLURM cluster, in a real container, with faults; every run ends with the local run's results."""

import json
import re
from pathlib import Path

import pytest
from checkout import PROFILE, REPORT, RUN_SECONDS, thaw
from cluster import ROOT, wait_for

pytestmark = pytest.mark.cluster

CELL = ("exp3", 0)


def test_image_is_named_by_what_it_is_made_from_and_passed_its_test(image, cluster, cache):
    assert image.is_file() and image.name.startswith("kvpipe-cpu-")
    link = image.parent / "kvpipe.sif"
    assert link.is_symlink() and link.resolve() == image.resolve()
    said = (cache / "images" / f"{image.name}.log").read_text(encoding="utf-8")
    assert "two training steps on cpu" in said, "its %test ran"
    inside = f"/home/ann/kvpipe/containers/{image.name}"
    labels = json.loads(cluster.run(f"apptainer inspect --labels --json {inside}"))["data"]["attributes"]["labels"]
    assert len(labels["kvpipe.lock-sha256"]) == 64 and labels["kvpipe.torch-variant"] == "cpu"


def test_dag_in_the_container_gives_the_results_of_a_local_run(site):
    with site.scenario("none: the whole DAG from clean") as row:
        assert site.finish(site.start()) == 0, site.tell()
        row.happened = f"{len(site.expected)} result files compared"
    provenance = site.cost(*CELL)["provenance"]
    digest = next((site.outside / "containers").glob("*.sha256")).read_text().split()[0]
    assert provenance["container"] == f"sha256:{digest}"
    assert provenance["host"] == "localhost", "the cell did not run on the cluster's node"
    log = (site.outside / "results/logs/train" / CELL[0] / f"seed{CELL[1]}.log").read_text(encoding="utf-8")
    assert "this job has GPUs (SLURM_" in log and "trains on the CPU" in log, "its GPU is a name, and torch sees none"


def test_dos_line_ends_are_refused_as_documented(cluster):
    said = cluster.run(r"printf '#!/bin/bash\r\ntrue\r\n' > dos.sh; sbatch dos.sh 2>&1 || true")
    entry = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("### DOS line ends")[2]
    assert said.strip() == entry.split("```")[1].removeprefix("text").strip()


def test_second_call_finds_nothing_to_do(site):
    assert site.finish(site.start()) == 0
    assert "Nothing to be done" in site.log.read_text()


def test_another_image_makes_everything_again(site):
    """Snakemake knows an image by its path; the doctor, which looks at the image too, is no job that could hide it."""
    other = "containers/kvpipe-cpu-0123456789ab.sif"
    (image,) = (site.outside / "containers").glob("kvpipe-cpu-*.sif")
    site.cluster.run(f"ln {image.name} {Path(other).name}", folder=site.inside / "containers")
    dry = f"python3 -m snakemake {PROFILE} -n"
    try:
        plan = site.cluster.run(f"KVPIPE_IMAGE={other} {dry} -- {REPORT}", 300, folder=site.inside)
    finally:
        site.cluster.run(f"rm {other}", folder=site.inside)
    whole = site.cluster.run(f"{dry} --forceall -- {REPORT}", 300, folder=site.inside)
    jobs = [re.search(r"^total +(\d+)", said, re.MULTILINE) for said in (plan, whole)]
    assert jobs[0] and jobs[1] and int(jobs[0][1]) == int(jobs[1][1]) > len(site.expected) / 2, plan
    assert "Software environment definition has changed" in plan


def test_scancel_before_the_first_checkpoint(site):
    with site.scenario("`scancel` of a cell before its first checkpoint") as row:
        site.drop(*CELL)
        run = site.start()
        site.freeze(*CELL, before=True)
        job = site.job(*CELL)
        site.cluster.run(f"scancel {job}")
        row.happened = f"{site.wait_state(job, 'CANCELLED', 'FAILED')}, tried again"
        assert site.finish(run) == 0, site.tell()
        row.restarts = site.cost(*CELL)["restarts"]


def test_job_over_its_time_limit(site):
    with site.scenario("job over its time limit") as row:
        site.drop(*CELL)
        run = site.start()
        cell = site.freeze(*CELL)
        job = site.job(*CELL)
        # of the running job, so that no slow machine decides where the limit falls
        site.cluster.run(f"scontrol update jobid={job} timelimit=1")
        row.happened = f"{site.wait_state(job, 'TIMEOUT', seconds=300)}, tried again with more time"
        assert not cell.is_running()
        assert site.finish(run) == 0, site.tell()
        row.restarts = site.cost(*CELL)["restarts"]
    assert row.restarts >= 1


def test_scancel_of_a_running_cell(site):
    with site.scenario("scancel of a running cell") as row:
        site.drop(*CELL)
        run = site.start()
        site.freeze(*CELL)
        job = site.job(*CELL)
        assert "TresPerJob=gres/gpu:1" in site.cluster.run(f"scontrol show job {job}"), "the cell has its GPU"
        site.cluster.run(f"scancel {job}")
        # whether it saved at SIGTERM is tests/train/test_checkpoint.py's: here the next attempt's log replaces its last words
        row.happened = f"{site.wait_state(job, 'CANCELLED', 'FAILED')}, tried again"
        assert site.finish(run) == 0, site.tell()
        row.restarts = site.cost(*CELL)["restarts"]
    assert row.restarts >= 1


def test_preemption_with_requeue(site):
    with site.scenario("preemption with requeue") as row:
        site.drop(*CELL)
        run = site.start()
        site.freeze(*CELL)
        job = site.job(*CELL)
        site.cluster.run("sbatch --partition urgent --gpus 2 --ntasks 2 --time 1 --output /dev/null --wrap 'sleep 5'")
        row.happened = f"{site.wait_state(job, 'PENDING')} behind an urgent job, then run again by SLURM"
        assert site.finish(run) == 0, site.tell()
        assert "Requeue=1" in site.cluster.run(f"scontrol show job {job}") and site.cluster.jobs()[job] == "COMPLETED"
        row.restarts = site.cost(*CELL)["restarts"]
    assert row.restarts >= 1


def test_node_down_and_back(site):
    with site.scenario("node down and back") as row:
        site.drop(*CELL)
        run = site.start()
        site.freeze(*CELL)
        job = site.job(*CELL)
        site.cluster.control("scontrol update nodename=localhost state=down reason=test")
        row.happened = f"{site.wait_state(job, 'PENDING', 'NODE_FAIL')}, node resumed, run again"
        site.cluster.control("scontrol update nodename=localhost state=resume")
        assert site.finish(run) == 0, site.tell()
        row.restarts = site.cost(*CELL)["restarts"]
    assert row.restarts >= 1


def test_slurmctld_restarted(site):
    with site.scenario("slurmctld restarted") as row:
        site.drop(*CELL)
        run = site.start()
        cell = site.freeze(*CELL)
        job = site.job(*CELL)
        site.cluster.stop_daemon("slurmctld")
        # long enough for Snakemake to ask in vain
        with pytest.raises(AssertionError):
            wait_for(
                "squeue to answer without its controller", lambda: "UP" in site.cluster.run("scontrol ping||true"), 30
            )
        site.cluster.start_daemon("slurmctld")
        thaw(cell)
        # The plugin looks at MinJobAge before each round of questions; where that falls into the outage, it asks the sacct
        # on the PATH for the whole round, which knows nothing here, and then for no job any more.
        misled = "Falling back to 'sacct'"
        wait_for(
            "Snakemake to end, or to ask sacct",
            lambda: run.poll() is not None or misled in site.log.read_text(encoding="utf-8"),
            RUN_SECONDS,
            tell=site.tell,
        )
        if run.poll() is None:
            site.wait_state(job, "COMPLETED")
            site.kill(run)
            site.unlock()
            status = site.finish(site.start())
            row.happened = "the cell went on, Snakemake turned to sacct in vain; killed, the same command again"
        else:
            status = run.returncode
            row.happened = "the cell went on, Snakemake asked until it was answered"
        assert status == 0, site.tell()
        row.restarts = site.cost(*CELL)["restarts"]
    assert row.restarts == 0


def test_snakemake_killed_and_restarted(site):
    with site.scenario("Snakemake killed and started again") as row:
        site.drop(*CELL)
        run = site.start()
        site.freeze(*CELL)
        job = site.job(*CELL)
        site.kill(run)
        assert site.cluster.jobs()[job] == "RUNNING", "the job goes on without Snakemake"
        # docs/hpc.md: what is still queued or running belongs to nobody and would write beside the new run
        site.cluster.run("scancel --me")
        site.wait_state(job, "CANCELLED", "FAILED")
        site.unlock()
        row.happened = "its job cancelled, unlocked, the same command again"
        assert site.finish(site.start()) == 0, site.tell()
        row.restarts = site.cost(*CELL)["restarts"]
    assert row.restarts >= 1


def test_full_scratch_disk(site):
    with site.scenario("full scratch disk") as row:
        site.drop(*CELL)
        scratch = "/home/ann/kvpipe/results/checkpoints"
        site.cluster.control(f"mkdir -p {scratch} && mount -t tmpfs -o size=24m,uid=1000,gid=1000 tmpfs {scratch}")
        try:
            run = site.start(f"{PROFILE} --retries 0")
            cell = site.freeze(*CELL)
            site.cluster.control(f"dd if=/dev/zero of={scratch}/filler bs=64k status=none || true")
            thaw(cell)
            assert site.finish(run) != 0, "a full disk is an error"
            said = site.log.read_text(encoding="utf-8")
            assert "CheckpointNotWritten" in said and "run the same command again" in said.replace("\n", " "), said[
                -4000:
            ]
            site.cluster.control(f"rm {scratch}/filler")
            row.happened = "CheckpointNotWritten in Snakemake's output; space made, the same command again"
            assert site.finish(site.start()) == 0, site.tell()
        finally:
            site.settle()
            site.cluster.control(f"umount {scratch}")
        row.restarts = site.cost(*CELL)["restarts"]
    assert row.restarts >= 1


def test_accounting_off(site):
    with site.scenario("accounting off, sacct on the PATH") as row:
        assert "disabled" in site.cluster.run("sacct 2>&1 || true")
        site.drop(*CELL)
        # sacct as Snakemake's source, against the profile: the job ends, and Snakemake does not learn of it
        run = site.start(f"{PROFILE} --slurm-status-command sacct")
        job = wait_for("the cell's job", lambda: site.find_job(*CELL), 300, 1, site.tell)
        site.wait_state(job, "COMPLETED", seconds=300)
        with pytest.raises(AssertionError):
            wait_for("Snakemake to notice", lambda: run.poll() is not None or site.find_job(*CELL, rule="evaluate"), 60)
        site.kill(run)
        site.unlock()
        row.happened = "asking sacct hangs; squeue, as in the profile, does not"
        assert site.finish(site.start()) == 0, site.tell()
