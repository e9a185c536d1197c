"""What others have reported of Snakemake, Slurm and Apptainer, tried here; docs/troubleshooting.md has the verdicts.

A workflow of its own, small, through the same profile; reports of which a fault of test_cluster.py is the case are not repeated.
"""

import pytest
from checkout import PROFILE, Site
from cluster import HOME

pytestmark = pytest.mark.cluster

SNAKEFILE = """
rule gpus:
    output: "reports/gpus.txt"
    resources: gpu=2, mem_mb=500, runtime=5
    shell: "echo $CUDA_VISIBLE_DEVICES > {output}"

rule fails:
    output: "reports/fails.txt"
    resources: mem_mb=lambda wildcards, attempt: 500 * attempt, runtime=5
    shell: "echo {resources.mem_mb} $SLURM_JOB_ID >> attempts.txt; test $(wc -l < attempts.txt) -ge 3 && touch {output}"

rule threads:
    output: "reports/threads.txt"
    threads: 2
    resources: mem_mb=500, runtime=5, slurm_partition="shared"
    shell: "echo {threads} $SLURM_CPUS_PER_TASK > {output}"

rule cell:
    output: "reports/cell{n}.txt"
    resources: mem_mb=lambda wildcards: 500 * int(wildcards.n), runtime=5
    shell: "scontrol show job $SLURM_JOB_ID | grep -o 'ReqTRES=.*mem=[0-9]*M' | sed 's/.*mem=//' > {output}"
"""


@pytest.fixture(scope="module")
def small(cluster):
    """Snakemake on the login side, for a file of the workflow above."""
    site = Site(cluster, {})
    (cluster.home / "kvpipe" / "reports.smk").write_text(SNAKEFILE, encoding="utf-8")

    def make(name: str) -> list[str]:
        assert site.finish(site.start(f"{PROFILE} --snakefile reports.smk", f"reports/{name}.txt")) == 0, site.tell()
        return (site.outside / "reports" / f"{name}.txt").read_text(encoding="utf-8").split()

    yield site, make
    site.settle()


def test_tasks_of_an_array_all_have_the_memory_of_one(small):
    """Why docs/hpc.md does not use arrays: a second attempt, with more memory, would stand beside a first."""
    site, _ = small
    found = {}
    for name, options in (("each", ""), ("array", "--slurm-array-jobs cell")):
        site.cluster.run("rm -f reports/cell*.txt", folder=site.inside)
        started = site.start(f"{PROFILE} {options} --snakefile reports.smk", "reports/cell1.txt reports/cell3.txt")
        assert site.finish(started) == 0, site.tell()
        found[name] = [(site.outside / f"reports/cell{n}.txt").read_text(encoding="utf-8").split() for n in (1, 3)]
    assert found["each"] == [["500M"], ["1500M"]]
    # of the one that is submitted first; the last task has the number of the array, for which Slurm shows them all
    assert len({memory for task in found["array"] for memory in task}) == 1, found


def test_a_job_of_two_gpus_sees_both(small):
    """snakemake-executor-plugin-slurm#459: the step saw one of two."""
    assert small[1]("gpus") == ["0,1"]


def test_a_job_is_tried_as_often_as_the_profile_says_each_time_with_more(small):
    """snakemake-executor-plugin-slurm#284: retries ran inside the job, with the memory that had not been enough."""
    site, make = small
    make("fails")
    attempts = [line.split() for line in (site.outside / "attempts.txt").read_text(encoding="utf-8").splitlines()]
    assert [memory for memory, _ in attempts] == ["500", "1000", "1500"]
    assert len({job for _, job in attempts}) == 3, "a job of its own for each"


def test_snakemake_in_a_job_starts_jobs_with_more_threads_than_its_own(small):
    """snakemake-executor-plugin-slurm#113: threads were those of the job around."""
    site, _ = small
    command = f"python3 -m snakemake {PROFILE} --snakefile reports.smk -- reports/threads.txt"
    job = site.cluster.run(
        f"sbatch --parsable --partition shared --ntasks 1 --mem 500 --output outer.log --wrap '{command}'",
        folder=site.inside,
    ).strip()
    state = site.wait_state(job, "COMPLETED", "FAILED", seconds=900)
    assert state == "COMPLETED", (site.outside / "outer.log").read_text(encoding="utf-8")
    assert (site.outside / "reports/threads.txt").read_text(encoding="utf-8").split() == ["2", "2"]


def test_modules_of_the_host_stay_out_of_the_image(cluster, image):
    """snakemake#3199: PYTHONPATH of the host reaches the image."""
    (cluster.home / "module").mkdir()
    (cluster.home / "module" / "einops.py").write_text("raise SystemExit('the host\\'s')\n", encoding="utf-8")
    python = "apptainer exec --home $PWD containers/kvpipe.sif python -c 'import einops; print(einops.__file__)'"
    said = cluster.run(f"PYTHONPATH={HOME}/module {python}", folder=HOME / "kvpipe")
    assert said.strip().splitlines()[-1].startswith("/opt/venv/")


def test_a_tmpdir_that_the_image_does_not_have_is_said(cluster, image):
    """nextgenusfs/funannotate#778: mktemp failed in the image."""
    cluster.run("mkdir -p /var/spool/scratch && chmod 777 /var/spool/scratch", user="root")
    doctor = "python3 -m kvpipe doctor --profile profiles/slurm-test || true"
    said = cluster.run(f"TMPDIR=/var/spool/scratch {doctor}", 120, folder=HOME / "kvpipe")
    assert "TMPDIR in the image" in said and "TMPDIR in the image" not in cluster.run(
        doctor, 120, folder=HOME / "kvpipe"
    )
