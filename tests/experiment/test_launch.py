"""How a job starts: processes by its resources, the command line, the image and its digest."""

import subprocess

import pytest

from kvpipe.experiment.launch import check_nodes, command, image_digest, image_path, processes


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, (0, 1)),
        ({"gpu": 1}, (1, 1)),
        ({"gpu": 4}, (4, 1)),
        ({"gpu": 4, "nodes": 1}, (4, 1)),
        ({"gpu": 6, "nodes": 3}, (6, 3)),
        ({"gres": "gpu:2"}, (2, 1)),
        ({"gres": "gpu"}, (1, 1)),
        ({"gres": "gpu:a100:2", "nodes": 3}, (6, 3)),
        ({"gres": "lustre:1", "gpu": 2}, (2, 1)),
    ],
)
def test_processes_follow_the_resources(resources, expected):
    assert processes(resources) == expected


@pytest.mark.parametrize("resources", [{"gpu": 3, "nodes": 2}, {"nodes": 2}])
def test_gpus_that_do_not_divide_by_the_nodes_are_refused(resources):
    with pytest.raises(ValueError, match="every node needs the same number"):
        processes(resources)


NODES = {"gres": "gpu:2", "nodes": 3, "mpi": "srun", "tasks": 3, "tasks_per_gpu": 0}


@pytest.mark.parametrize(
    ("without", "lines"),
    [("mpi", "mpi: srun"), ("tasks", "tasks: 3"), ("tasks_per_gpu", "tasks_per_gpu: 0")],
)
def test_a_cell_on_several_nodes_has_the_lines_that_let_it_call_srun(without, lines):
    check_nodes(NODES)
    check_nodes({"gpu": 4})
    with pytest.raises(ValueError, match=rf"a cell on 3 nodes .*profile: {lines}$"):
        check_nodes({key: value for key, value in NODES.items() if key != without})
    with pytest.raises(ValueError, match=r"mpi: srun, tasks: 2, tasks_per_gpu: 0$"):
        check_nodes({"gpu": 4, "nodes": 2})


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_gpu_or_none_is_one_process(gpus):
    assert command(gpus) == "python -m kvpipe"


def test_several_gpus_are_launched_by_accelerate():
    assert command(4) == (
        "accelerate launch --multi_gpu --num_machines 1 --num_processes 4 --mixed_precision no --dynamo_backend no "
        "--main_process_port 0 --module kvpipe"
    )


def test_several_nodes_are_launched_by_srun_in_the_image_of_each():
    assert command(6, 3, "apptainer exec image.sif") == (
        "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 apptainer exec image.sif bash -c "
        '\'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"\' node '
        "--multi_gpu --num_machines 3 --num_processes 6 --mixed_precision no --dynamo_backend no "
        "--main_process_ip $(hostname) --main_process_port $((20000 + SLURM_JOB_ID % 20000)) --module kvpipe"
    )


def test_the_shell_of_each_node_gets_its_rank_and_all_arguments(tmp_path):
    """The line in a real shell, with stand-ins that show what they were called with."""
    for name, body in {
        # drops its three options, as srun would, and gives the task its number
        "srun": 'shift 3; SLURM_NODEID=2 exec "$@"',
        "accelerate": 'printf "%s\\n" "$@"',
        "hostname": "echo first",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    line = f"{command(6, 3)} train --arm 'an arm'"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "41234"}
    said = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True).stdout
    given = said.splitlines()
    assert given[:3] == ["launch", "--machine_rank", "2"]
    assert given[given.index("--main_process_ip") + 1] == "first"
    assert given[given.index("--main_process_port") + 1] == "21234"
    assert given[-5:] == ["--module", "kvpipe", "train", "--arm", "an arm"]


def test_accelerate_has_these_options():
    """Its own parser reads the line, so that a renamed option is noticed."""
    from accelerate.commands.launch import launch_command_parser

    words = [*command(4).split()[2:], "train", "--arm", "full"]
    found = launch_command_parser().parse_args(words)
    assert (found.multi_gpu, found.num_processes, found.main_process_port, found.module) == (True, 4, 0, True)
    assert (found.training_script, found.training_script_args) == ("kvpipe", ["train", "--arm", "full"])


def test_the_image_is_followed_to_the_file_named_by_its_content(tmp_path):
    image = tmp_path / "kvpipe-cuda-0123456789ab.sif"
    image.touch()
    (tmp_path / "kvpipe.sif").symlink_to(image.name)
    assert image_path(str(tmp_path / "kvpipe.sif")) == str(image)
    assert image_path(str(image)) == str(image)
    assert image_digest(str(image)) is None
    (tmp_path / f"{image.name}.sha256").write_text(f"abc123  {image.name}\n", encoding="ascii")
    assert image_digest(str(image)) == "sha256:abc123"
