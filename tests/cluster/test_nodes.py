"""A cell on two nodes, by the lines of docs/hpc.md: two slurmd on this machine, each with a GPU that is a name only."""

import re

import pytest
import yaml
from checkout import Site
from cluster import ROOT

# two nodes, and every step twice: minutes
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CELL = ("control", 0)
TARGET = "results/train/control/seed0/history.jsonl"
COMPARED = ("model/model.safetensors", "history.jsonl")


def documented() -> dict[str, object]:
    """The resources of a cell on several nodes as docs/hpc.md prints them, for one GPU of each node."""
    text = (ROOT / "docs" / "hpc.md").read_text(encoding="utf-8")
    found = re.search(r"`(gres: gpu:)\d+(, nodes: 2, mpi: srun, [^`]*)`", text)
    assert found, "docs/hpc.md has no line for a cell on two nodes"
    return yaml.safe_load(f"{{{found[1]}1{found[2]}}}")


@pytest.fixture(scope="module")
def site(pair):
    """The checkout on two nodes, with a profile whose cells are on both."""
    site = Site(pair, {})
    settings = yaml.safe_load((site.outside / "profiles/slurm-test/config.yaml").read_text(encoding="utf-8"))
    settings["set-resources"]["train"] = {"mem_mb": 4000, "runtime": 20} | documented()
    (site.outside / "profiles/two").mkdir()
    (site.outside / "profiles/two/config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    yield site
    site.settle()


def made(site: Site) -> dict[str, bytes]:
    """What the cell has left, once Snakemake is done."""
    assert site.finish(site.runs[-1]) == 0, site.tell()
    return {name: (site.outside / TARGET).parent.joinpath(name).read_bytes() for name in COMPARED}


def test_a_cell_on_two_nodes_goes_on_where_it_was_stopped(site):
    site.start("--profile profiles/two", TARGET)
    whole = made(site)
    cost = site.cost(*CELL)
    assert cost["processes"] == 2 and cost["restarts"] == 0
    site.drop(*CELL)
    site.start("--profile profiles/two", TARGET)
    site.freeze(*CELL)
    assert len(site.trainings(*CELL)) == 2, site.tell()
    job = site.job(*CELL)
    step = site.cluster.run(f"scontrol show step {job}")
    assert re.search(r"Nodes=2\b", step) and "NodeList=one,two" in step, step
    site.cluster.run(f"scancel {job}")
    site.wait_state(job, "CANCELLED", "FAILED")
    again = made(site)
    assert site.cost(*CELL)["restarts"] >= 1
    assert again == whole, "the cell that was stopped ends otherwise"
