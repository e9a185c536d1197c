import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from kvpipe import config as configuration
from kvpipe.experiment import launch
from kvpipe.experiment.plan import Dag, digest
from kvpipe.experiment.paths import SPLITS, Paths
from kvpipe.experiment.provenance import code_hash, git_commit

# a file given with --configfile takes the place of the embedded experiment, it is not laid over it
if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


try:
    # Snakemake has read these already; of a key that stands twice it kept the last
    for path in workflow.configfiles:
        configuration.read(path)
    config = configuration.with_lock(config, workflow.configfiles)
    PLAN = Dag(configuration.parse(config, origin=", ".join(map(str, workflow.configfiles)) or "configuration"))
except configuration.ConfigError as error:
    raise WorkflowError(str(error))

PATHS = Paths(Path(os.environ.get("KVPIPE_RESULTS", "results")))
IMAGE = launch.image_path(os.environ.get("KVPIPE_IMAGE", "containers/kvpipe.sif"))
SEEDS = PLAN.config.seeds

# Jobs read the configuration from a file named by its content (KVPIPE_CONFIG): a change of config.yaml while a run
# is under way cannot reach jobs that start later. It is no param: only the settings a step reads make it run again.
CONFIG_FILE = str(PATHS.configuration(digest(config, 16)))


def write_config():
    path = Path(CONFIG_FILE)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


write_config()
os.environ.update(KVPIPE_CONFIG=CONFIG_FILE, KVPIPE_RESULTS=str(PATHS.root))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For provenance: seen only inside the image, and by a compute node or an image without git.
if launch.image_digest(IMAGE):
    os.environ.update(APPTAINERENV_KVPIPE_IMAGE_DIGEST=launch.image_digest(IMAGE))
if git_commit():
    os.environ.update(KVPIPE_GIT_COMMIT=git_commit())


wildcard_constraints:
    arm="|".join(PLAN.arms),
    seed="|".join(map(str, SEEDS)),
    model="|".join(PLAN.config.models),
    teacher="|".join(PLAN.teachers) or "none",
    reading="student|own",
    shard=r"\d+",


# ---------------------------------------------------------------- params: what a step depends on beside its inputs
def settings_of(step, *names):
    """The part of the configuration that a step reads, for the given wildcards."""

    def of(wildcards):
        return PLAN.depends(step, **{name: wildcards[name] for name in names})

    return of


def code_of(step):
    """Hash of the code behind a step."""
    return code_hash(f"kvpipe.{step}")


# ---------------------------------------------------------------- before the first job
APPTAINER = "apptainer" in {str(method) for method in workflow.deployment_settings.deployment_method}
IN_IMAGE = f"apptainer exec --home $PWD {workflow.deployment_settings.apptainer_args} {IMAGE}" if APPTAINER else ""
if APPTAINER and "://" not in IMAGE and not Path(IMAGE).exists():
    raise WorkflowError(
        f"the image {IMAGE} does not exist, and every job would fail: make image, or make image-offline; KVPIPE_IMAGE "
        "names another one"
    )


def examine():
    """Start nothing where the doctor sees what would fail. Its findings are in the report; they make no job run again."""
    if workflow.touch:
        return
    named = argparse.ArgumentParser()
    named.add_argument("--profile", nargs="*", default=[os.environ.get("SNAKEMAKE_PROFILE")])
    profile = named.parse_known_args()[0].profile[-1]
    python = f"{IN_IMAGE} python" if APPTAINER else shlex.quote(sys.executable)
    command = f"{python} -m kvpipe doctor --out {shlex.quote(str(PATHS.doctor))}"
    command += f" --profile {shlex.quote(profile)}" if profile else ""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = PATHS.log("doctor")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise WorkflowError(
            f"{done.stdout}nothing was started, since it would fail ({log}); --no-hooks starts it all the same"
        )


# ---------------------------------------------------------------- processes of a cell, by its resources
CELL = workflow.resource_settings.overwrite_resources.get("train", {})
CELL_NODES = CELL["nodes"].value if "nodes" in CELL else 1


def cell_image():
    """On several nodes the job starts the image itself, on each of them."""
    return IMAGE if CELL_NODES == 1 else None


def cell_launcher(wildcards, resources):
    """One process, or accelerate's launcher."""
    launch.check_nodes(resources)
    return launch.command(*launch.processes(resources), container=IN_IMAGE)


# ---------------------------------------------------------------- inputs
def model_inputs(wildcards):
    return [PATHS.manifest(m) for m in PLAN.model_needs(wildcards.model)] + (
        [PATHS.data("train")] if PLAN.model_reads_data(wildcards.model) else []
    )


def teacher_inputs(teacher, reading):
    files = [PATHS.manifest(teacher), PATHS.manifest(PLAN.config.student), PATHS.data("train")]
    if PLAN.store_needs_layer_map(teacher):
        files.append(PATHS.layer_map(teacher))
    return files


def shard_inputs(wildcards):
    return teacher_inputs(wildcards.teacher, wildcards.reading)


def index_inputs(wildcards):
    """Shards are jobs of their own only when there are several."""
    files = teacher_inputs(wildcards.teacher, wildcards.reading)
    shards = PLAN.config.store.shards
    if shards > 1:
        files += [PATHS.shard(wildcards.teacher, wildcards.reading, i) for i in range(shards)]
    return files


def arm_inputs(arm):
    files = [PATHS.manifest(t) for t in arm.teachers]
    if PLAN.uses_store(arm):
        files += [PATHS.store_index(t, arm.time.text) for t in arm.teachers]
    if PLAN.needs_layer_map(arm):
        files += [PATHS.layer_map(t) for t in arm.teachers]
    return files


def fit_inputs(wildcards):
    return [PATHS.manifest(PLAN.config.student), PATHS.data("train"), *arm_inputs(PLAN.fit_arm(wildcards.fit))]


def train_inputs(wildcards):
    arm = PLAN.arm(wildcards.arm)
    files = [PATHS.manifest(PLAN.config.student), PATHS.data("train"), PATHS.data("validation"), *arm_inputs(arm)]
    if PLAN.needs_fit(arm):
        files.append(PATHS.projector(PLAN.fit_id(arm)))
    return files


def items_of(arms):
    return [PATHS.items(a, s) for a in arms for s in SEEDS]


def histories_of(arms):
    return [file(a, s) for a in arms for s in SEEDS for file in (PATHS.history, PATHS.cost)]


def arm_cells(wildcards):
    return items_of([wildcards.arm]) + histories_of([wildcards.arm])


def lm_eval_results():
    """Of every cell, where tasks are configured."""
    return [PATHS.lm_eval(a, s) for a, s in PLAN.cells] if PLAN.config.evaluate.lm_eval_tasks else []


def judged_teachers():
    """Teachers with weights that mean something."""
    return [t for t in PLAN.teachers if PLAN.config.models[t].source != "random"]
