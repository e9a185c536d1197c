import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

from kvpipe import config as configuration
from kvpipe.cli import server
from kvpipe.doctor.memory import job_memory
from kvpipe.doctor.workload import Workload
from kvpipe.experiment import launch
from kvpipe.experiment.plan import Dag, digest
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.provenance import code_hash, git_commit
from kvpipe.experiment.steps import table

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
STEPS = table(PLAN, PATHS)
IMAGE = launch.image_path(os.environ.get("KVPIPE_IMAGE", "containers/kvpipe.sif"))

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
    seed="|".join(map(str, PLAN.config.seeds)),
    model="|".join(PLAN.config.models),
    teacher="|".join(PLAN.teachers) or "none",
    reading="|".join(get_args(configuration.Reading)),
    shard=r"\d+",


# ---------------------------------------------------------------- the table of steps, as rules read it
def needs(step):
    """What a job reads."""

    def of(wildcards):
        return STEPS[step].needs(**{name: wildcards[name] for name in STEPS[step].wildcards})

    return of


def makes(step):
    """What a job writes; a name without an ending is a folder's."""
    files = STEPS[step].makes(**{name: f"{{{name}}}" for name in STEPS[step].wildcards})
    return {name: path if path.suffix else directory(path) for name, path in files.items()}


def settings(step):
    """The part of the configuration that a job depends on beside its inputs."""

    def of(wildcards):
        return STEPS[step].depends(**{name: wildcards[name] for name in STEPS[step].wildcards})

    return of


def code(step):
    """Hash of the code behind a step."""
    return code_hash(STEPS[step].hashed)


# ---------------------------------------------------------------- memory of a job, by the sizes of models and texts
@functools.cache
def estimates():
    """Rule → MB; no GPU is assumed, whose jobs have theirs in the profile."""
    return job_memory(Workload(PLAN.config, PATHS))


def memory(rule, otherwise):
    """MB of the host, more at every attempt; `otherwise` while the sizes are not known."""
    return lambda wildcards, attempt: estimates().get(rule, otherwise) * attempt


def captioned(step):
    """What the page's job writes; what `snakemake --report` shows of it has its caption in workflow/report."""
    files = makes(step)
    shown = {"page": report(files.pop("page"), caption="../report/report.rst", category="Report")}
    for name, path in files.items():
        kind, stem = name.partition("_")[0], name.rpartition("_")[0]
        if path.suffix in (".svg", ".csv"):
            category, labels = f"{kind.capitalize()}s", {kind: path.stem.replace("_", " ")}
            path = report(path, caption=f"../report/{stem}.rst", category=category, labels=labels)
        shown[name] = path
    return shown


# ---------------------------------------------------------------- before the first job
# the rules call `python`: that of the environment which Snakemake runs in, though nobody has activated it
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))
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


def serve():
    """Steps that are processes of this machine are forked from one that has imported the libraries."""
    where = "in another executor" if not workflow.local_exec else "in an image" if APPTAINER else None
    if not workflow.touch:
        server.start(PLAN.config.train.threads, where)


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
