"""The cluster as the doctor sees it: every finding is produced by what it warns of."""

import json
import re

import pytest
from conftest import PROFILE
from tiny import config

from kvpipe.doctor import Workload
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.provenance import PACKAGE
from kvpipe_cluster.profile import Request, parse_gpus
from kvpipe_cluster.slurm import check_slurm, parse_minutes, read_partitions, refusal

# a cell on two nodes
MPI = {"nodes": 2, "mpi": "srun", "tasks": 2, "tasks_per_gpu": 0}


def findings_on(profile):
    return [*check_slurm(Workload(config(profile), Paths(profile / "results"), profile))]


def found(profile):
    return {f.name: f for f in findings_on(profile)}


def changed(before: str, after: str) -> str:
    assert before in PROFILE
    return PROFILE.replace(before, after)


def test_a_sound_cluster(site, profile):
    findings = found(profile())
    assert {f.status for f in findings.values()} == {"ok"}
    assert findings["slurm"].detail.startswith("slurm-wlm 2")
    assert findings["accounting"].detail == "accounting is off, the executor asks squeue"
    shown = findings["partitions"].detail
    assert "gpu (default): 2 CPUs, 10000 MB, 2 GPU a100, 2 h" in shown
    assert "long: 2 CPUs, 10000 MB, 2 GPU a100, no time limit" in shown


def test_a_laptop_has_no_cluster_and_that_is_no_fault(site, profile):
    site.without("sbatch", "squeue", "sinfo", "scontrol", "sacct")
    (finding,) = findings_on(profile())
    assert finding.status == "ok"
    assert "jobs run on this machine" in finding.detail


def test_inside_a_job_the_cluster_is_left_alone(site, profile, monkeypatch):
    site.without("sinfo", "scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (finding,) = findings_on(profile())
    assert finding.status == "ok"


def test_a_controller_that_does_not_answer(site, profile):
    site.program(
        "scontrol", "echo 'slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    )
    finding = found(profile())["slurm"]
    assert finding.status == "would fail"
    assert "Unable to contact slurm controller" in finding.detail


def test_a_controller_that_hangs_is_given_up(site, profile, monkeypatch):
    monkeypatch.setattr("kvpipe.doctor.finding.PATIENCE", 0.3)
    site.program("scontrol", "exec sleep 60")
    finding = found(profile())["slurm"]
    assert finding.status == "would fail"
    assert "no answer within 0.3 s" in finding.detail


# ---------------------------------------------------------------- what would be waited for without an end
def test_sacct_without_accounting_hangs(site, profile):
    text = changed("slurm-status-command: squeue", "slurm-status-command: sacct")
    finding = found(profile(text))["accounting"]
    assert finding.status == "would fail"
    assert "wait for ever" in finding.detail
    assert finding.fix == "in the profile: slurm-status-command: squeue"


def test_the_default_status_command_is_sacct_where_it_is_on_the_path(site, profile):
    text = changed("slurm-status-command: squeue\n", "")
    assert found(profile(text))["accounting"].status == "would fail"
    site.without("sacct")
    assert found(profile(text))["accounting"].status == "ok"


def test_with_accounting_sacct_is_a_warning(site, profile):
    switch_on_accounting(site)
    finding = found(profile(changed("squeue", "sacct")))["accounting"]
    assert finding.status == "warning"
    assert "CANCELLED by" in finding.detail


def switch_on_accounting(site):
    lines = (site.answers / "config").read_text().splitlines()
    before = next(line for line in lines if "AccountingStorageType" in line)
    site.change("config", before, "AccountingStorageType   = accounting_storage/slurmdbd")


def test_sacct_that_is_not_on_the_path_is_not_asked(site, profile):
    """The executor then takes squeue, for which MinJobAge counts."""
    site.without("sacct")
    site.change("config", "MinJobAge               = 300 sec", "MinJobAge               = 130 sec")
    findings = found(profile(changed("squeue", "sacct")))
    assert findings["accounting"].detail == "accounting is off, the executor asks squeue"
    assert findings["MinJobAge"].status == "would fail"


def test_a_first_interval_for_which_the_executor_does_not_trust_squeue(site, profile):
    """It then asks sacct all the same, whatever the profile says."""
    text = PROFILE + "slurm-init-seconds-before-status-checks: "
    finding = found(profile(f"{text}101\n"))["MinJobAge"]
    assert finding.status == "would fail"
    assert finding.fix == "in the profile: slurm-init-seconds-before-status-checks: 100"
    assert found(profile(f"{text}100\n"))["MinJobAge"].status == "ok"
    site.without("sacct")
    assert found(profile(f"{text}101\n"))["MinJobAge"].status == "ok", "nothing to fall back on"
    assert found(profile(f"{text}241\n"))["MinJobAge"].status == "would fail"


@pytest.mark.parametrize("age", [30, 130, 239])
def test_jobs_that_leave_squeue_between_two_checks(site, profile, age):
    """The interval grows to 180 s, and a job that is not shown counts as running: no line of the profile helps."""
    site.change("config", "MinJobAge               = 300 sec", f"MinJobAge               = {age} sec")
    for first in (10, 40):
        text = f"{PROFILE}slurm-init-seconds-before-status-checks: {first}\n"
        finding = found(profile(text))["MinJobAge"]
        assert finding.status == "would fail"
        assert "no line of the profile helps below 240 s" in finding.fix
    switch_on_accounting(site)
    finding = found(profile())["MinJobAge"]
    assert finding.status == ("warning" if age < 120 else "would fail"), "below, the executor takes sacct by itself"
    assert finding.fix == "in the profile: slurm-status-command: sacct"


@pytest.mark.parametrize("age", [240, 0])
def test_jobs_that_stay_in_squeue_long_enough(site, profile, age):
    site.without("sacct")
    site.change("config", "MinJobAge               = 300 sec", f"MinJobAge               = {age} sec")
    assert found(profile())["MinJobAge"].status == "ok"


def preempts(site, mode):
    """The cluster's PreemptMode, and its partitions'."""
    for name in ("config", "partitions"):
        text = (site.answers / name).read_text()
        text = re.sub(r"^(PreemptMode +=).*", rf"\1 {mode}", text, flags=re.MULTILINE)
        (site.answers / name).write_text(re.sub(r"PreemptMode=\S+", f"PreemptMode={mode}", text))


@pytest.mark.parametrize("mode", ["CANCEL", "GANG,CANCEL"])
def test_preemption_that_cancels_hangs(site, profile, mode):
    preempts(site, mode)
    finding = found(profile(PROFILE + "slurm-requeue: true\n"))["preemption"]
    assert finding.status == "would fail"
    assert "PreemptMode CANCEL (gpu)" in finding.detail


def test_preemption_that_requeues(site, profile):
    preempts(site, "REQUEUE")
    assert found(profile())["preemption"].status == "warning"
    text = (site.answers / "config").read_text()
    (site.answers / "config").write_text(re.sub(r"^JobRequeue .*", "JobRequeue = 0", text, flags=re.MULTILINE))
    finding = found(profile())["preemption"]
    assert (finding.status, finding.fix) == ("would fail", "in the profile: slurm-requeue: true")
    assert "JobRequeue = 0: a preempted job (gpu REQUEUE) is cancelled" in finding.detail
    assert found(profile(PROFILE + "slurm-requeue: true\n"))["preemption"].status == "ok"


def test_an_account_without_accounting(site, profile):
    finding = found(profile(changed("runtime=60", "runtime=60, slurm_account=physics")))["account"]
    assert finding.status == "would fail"
    assert "physics" in finding.detail


# ---------------------------------------------------------------- what the cluster cannot hold
@pytest.mark.parametrize(
    ("resources", "detail", "fix"),
    [
        ({"gpu": 1, "gpu_model": "v100"}, "GPU type v100 is not in partition gpu (has a100)", "gpu_model: a100"),
        ({"gres": "gpu:v100:1"}, "GPU type v100 is not", "gpu_model: a100"),
        ({"gpu": 3}, "asks for 3 GPUs, a node of partition gpu has 2", "gpu: 2"),
        ({"gres": "gpu:5"}, "asks for 5 GPUs", 'gres: "gpu:2"'),
        (MPI | {"gres": "gpu:8"}, "asks for 16 GPUs on 2 nodes, a node of partition gpu has 2", 'gres: "gpu:2"'),
        (MPI | {"gpu": 6}, "asks for 6 GPUs on 2 nodes", "gpu: 4"),
        (MPI | {"gpu": 3}, "3 GPUs on 2 nodes: every node needs the same number", "set-resources: train"),
        ({"threads": 3}, "asks for 3 CPUs, a node of partition gpu has 2", "cpus_per_task: 2"),
        ({"mem_mb": "10001"}, "asks for 10001 MB, a node of partition gpu has 10000", "mem_mb: 10000"),
        ({"runtime": "121 * attempt"}, "asks for 121 min, partition gpu allows 120", "runtime: 120"),
        ({"runtime": "2d"}, "asks for 2880 min, partition gpu allows 120", "runtime: 120"),
        ({"runtime": "attempt * 1440"}, "asks for 1440 min", "runtime: 120"),
        ({"runtime": "max(121, 60*attempt)"}, "asks for 121 min", "runtime: 120"),
        ({"mem": "500GB"}, "asks for 500000 MB", "mem_mb: 10000"),
        ({"threads": 3, "mem_mb": "4000 * threads"}, "asks for 3 CPUs", "cpus_per_task: 2"),
        ({"slurm_partition": "fat"}, "no partition fat", "slurm_partition=gpu"),
        ({"slurm_partition": "long", "runtime": 9999, "gpu": 2, "mem_mb": 10000}, None, None),
        (MPI | {"gpu": 4, "gpu_model": "a100"}, None, None),
        (MPI | {"gres": "gpu:2"}, None, None),
        ({"gres": "gpu", "cpus_per_task": 2, "runtime": 120}, None, None),
    ],
)
def test_requests_against_the_partition(site, resources, detail, fix):
    problem = refusal(Request("train", resources), read_partitions())
    if detail is None:
        assert problem is None
    else:
        assert detail in problem[0]
        assert fix in problem[1]


@pytest.mark.parametrize(
    ("key", "value", "detail", "fixed"),
    [
        ("runtime", "50 * attempt", "asks for 150 min, partition gpu allows 120 (attempt 3)", "min(50 * attempt, 120)"),
        ("runtime", "min(120 * attempt, 240)", "asks for 240 min, partition gpu allows 120 (attempt 2)", "120"),
        ("mem_mb", "4000 * attempt", "asks for 12000 MB, a node of partition gpu has 10000 (attempt 3)", "min(4000 * "),
    ],
)
def test_a_later_attempt_that_does_not_fit(site, profile, key, value, detail, fixed):
    """Without EnforcePartLimits it would be pending for ever."""

    def requests(value, more="retries: 2\n"):
        resources = json.dumps({"gpu": 1, "mem_mb": 9000, "runtime": 100} | {key: value})
        text = changed("{gpu: 1, mem_mb: 9000, runtime: 100 * attempt}", resources)
        return found(profile(text + more))["requests"]

    assert requests(value, "").status == "ok"
    finding = requests(value)
    assert (finding.status, finding.detail) == ("would fail", f"train: {detail}")
    line = finding.fix.removeprefix("in the profile: ").split("   #")[0]
    assert line.startswith(f"{key}: {fixed}")
    assert requests(line.removeprefix(f"{key}: ")).status == "ok", "the line to paste helps"


def test_a_value_that_only_the_job_knows(site, profile):
    finding = found(profile(changed("9000", "2 * input.size_mb")))["requests"]
    assert finding.status == "warning"
    assert "train mem_mb: 2 * input.size_mb: not known before" in finding.detail


def test_rules_with_one_fault_are_one_finding(site, profile):
    text = changed("mem_mb: 9000", "mem_mb: 20000") + "set-threads: {evaluate: 1}\n"
    (finding,) = [f for f in findings_on(profile(text)) if f.name == "requests"]
    assert finding.status == "would fail"
    assert finding.detail.startswith("train: asks for 20000 MB")


def test_threads_of_the_configuration_are_cpus_of_the_job(site, tmp_path):
    """The shipped rules and profile; a node of the site has two."""
    shipped = PACKAGE.parent / "profiles" / "slurm"
    work = Workload(config(tmp_path, {"train.threads": 3}), Paths(tmp_path / "results"), shipped)
    (finding,) = [f for f in check_slurm(work) if f.name == "requests" and "CPUs" in f.detail]
    assert {"train", "evaluate"} <= set(finding.detail.partition(":")[0].split(", "))
    assert "asks for 3 CPUs, a node of partition gpu has 2" in finding.detail and "train.threads" in finding.fix


def test_no_default_partition_and_none_named(site, profile):
    site.change("partitions", "Default=YES", "Default=NO")
    finding = found(profile())["requests"]
    assert finding.status == "would fail"
    assert "no partition is the default" in finding.detail
    assert found(profile(changed("runtime=60", "runtime=60, slurm_partition=long")))["requests"].status == "ok"


def test_a_partition_without_gpus_and_one_that_is_down(site, profile):
    site.nodes("gpu|up|2|10000|2:00:00|(null)", "long|up|2|10000|infinite|gpu:2")
    assert "partition gpu has no GPU" in found(profile())["requests"].detail
    site.nodes("gpu|up|2|10000|2:00:00|(null)")
    assert found(profile())["partitions"].status == "would fail"
    site.nodes("gpu|down|2|10000|2:00:00|gpu:2")
    assert "is down" in found(profile())["requests"].detail


def test_nodes_of_several_kinds_are_one_partition(site):
    site.nodes("gpu|up|16+|64000+|1-00:00:00|gpu:a100:4(S:0-1)", "gpu|up|64|9000|1-00:00:00|gpu:h100:8,shard:2")
    (partition,) = read_partitions()
    assert (partition.cpus, partition.mem_mb, partition.minutes) == (64, 64000, 1440)
    assert partition.gpus == {"a100": 4, "h100": 8}
    assert partition.default


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("(null)", {}),
        ("gpu:2", {"": 2}),
        ("gpu", {"": 1}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:4(S:0),gpu:v100:2(S:1),nvme:1", {"a100": 4, "v100": 2}),
        ("gpu:nvidia_h100_80gb_hbm3:8", {"nvidia_h100_80gb_hbm3": 8}),
        ("gpu:3g.20gb:2", {"3g.20gb": 2}),
        ("gpu:a100:1,gpu:a100:1", {"a100": 2}),
    ],
)
def test_gres(gres, expected):
    assert parse_gpus(gres) == expected


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("infinite", None), ("30:00", 30), ("2:00:00", 120), ("1-12:30:00", 2190), ("10-00:00:00", 14400), ("n/a", None)],
)
def test_time_limits(text, minutes):
    assert parse_minutes(text) == minutes
