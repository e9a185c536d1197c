"""containers/image.sh with a stand-in for Apptainer: names, what is passed on, what it says when something is missing."""

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
APPTAINER = """#!/bin/sh
echo "$@" >> calls
for word; do before=$last; last=$word; done
echo "an image" > "$before"
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "containers").mkdir()
    for name in ("containers/image.sh", "containers/kvpipe.def", "containers/image.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "apptainer").write_text(APPTAINER, encoding="utf-8")
    (tmp_path / "apptainer").chmod(0o755)
    return tmp_path


def image(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "APPTAINER": "./apptainer", "VARIANT": "cpu"} | variables
    line = ["containers/image.sh", *arguments]
    return subprocess.run(line, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def add_wheel(checkout: Path) -> None:
    (checkout / "containers" / "wheelhouse").mkdir()
    (checkout / "containers" / "wheelhouse" / "torch-0-py3-none-any.whl").touch()


def test_name_is_the_hash_of_lock_and_definition(checkout):
    content = (checkout / "containers/image.lock").read_bytes() + (checkout / "containers/kvpipe.def").read_bytes()
    first = image(checkout, "name").stdout
    assert first == f"containers/kvpipe-cpu-{sha256(content).hexdigest()[:12]}.sif\n"
    for name in ("containers/image.lock", "containers/kvpipe.def"):
        with (checkout / name).open("a", encoding="utf-8") as handle:
            handle.write("# more\n")
        second = image(checkout, "name").stdout
        assert second != first
        first = second


def test_offline_build_from_a_folder_and_a_wheelhouse(checkout):
    add_wheel(checkout)
    done = image(checkout, "offline", "containers")
    assert done.returncode == 0, done.stderr
    call = (checkout / "calls").read_text(encoding="utf-8")
    for word in ("bootstrap=localimage", "from=containers", "wheelhouse=containers/wheelhouse", "variant=cpu"):
        assert f"--build-arg {word}" in call
    name = image(checkout, "name").stdout.strip()
    link = checkout / "containers" / "kvpipe.sif"
    assert link.is_symlink() and link.read_text() == "an image\n" and link.resolve() == (checkout / name).resolve()
    digest = (checkout / f"{name}.sha256").read_text(encoding="ascii").split()[0]
    assert digest == sha256(b"an image\n").hexdigest()


def test_what_is_built_is_not_built_again(checkout):
    assert image(checkout, "online").returncode == 0
    again = image(checkout, "online")
    assert again.returncode == 0 and "is up to date" in again.stdout
    assert len((checkout / "calls").read_text(encoding="utf-8").splitlines()) == 1


def test_digest_is_that_of_the_image_that_was_built_again(checkout):
    image(checkout, "online")
    name = image(checkout, "name").stdout.strip()
    (checkout / name).unlink()
    (checkout / "apptainer").write_text(APPTAINER.replace("an image", "another image"), encoding="utf-8")
    assert image(checkout, "online").returncode == 0
    digest = (checkout / f"{name}.sha256").read_text(encoding="ascii").split()[0]
    assert digest == sha256(b"another image\n").hexdigest()


def test_another_build_of_torch_has_a_name_of_its_own(checkout):
    """Under the name of the first, what is there would be up to date."""
    index = "https://wheels.example/cu126"
    done = image(checkout, "online", VARIANT="", TORCH_INDEX=index)
    assert done.returncode == 1 and "VARIANT=cu126" in done.stderr
    assert image(checkout, "online").returncode == 0
    assert image(checkout, "online", VARIANT="cu126", TORCH_INDEX=index).returncode == 0
    assert f"torch_index={index}" in (checkout / "calls").read_text(encoding="utf-8").splitlines()[1]
    assert "kvpipe-cu126-" in (checkout / "containers" / "kvpipe.sif").readlink().name


def test_make_passes_a_base_with_a_space_on(checkout):
    add_wheel(checkout)
    shutil.copy(ROOT / "Makefile", checkout / "Makefile")
    (checkout / "my base.sif").touch()
    environment = os.environ | {"APPTAINER": "./apptainer", "VARIANT": "cpu"}
    line = ["make", "image-offline", "BASE=my base.sif"]
    done = subprocess.run(line, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "from=my base.sif" in (checkout / "calls").read_text(encoding="utf-8")


def test_failed_build_leaves_no_image(checkout):
    (checkout / "apptainer").write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    assert image(checkout, "online").returncode == 3
    assert not list((checkout / "containers").glob("*.sif"))


def test_wheels_below_a_path_with_a_space_are_refused(checkout):
    """The definition's %files splits at it."""
    (checkout / "my wheels").mkdir()
    (checkout / "my wheels" / "torch-0-py3-none-any.whl").touch()
    offline = image(checkout, "offline", "containers", WHEELHOUSE="my wheels")
    online = image(checkout, "online", TMPDIR=str(checkout / "my wheels"))
    for done, said in ((offline, "'my wheels'; set WHEELHOUSE"), (online, "(online: TMPDIR)")):
        assert done.returncode == 1 and said in done.stderr
    assert [path.name for path in (checkout / "my wheels").iterdir()] == ["torch-0-py3-none-any.whl"]
    assert not (checkout / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "wheels", "apptainer", "said"),
    [
        (["offline"], True, "./apptainer", "needs BASE="),
        (["offline", "nowhere"], True, "./apptainer", "'nowhere' is none"),
        (["offline", "containers"], False, "./apptainer", "run make wheelhouse"),
        (["online"], False, "no-such-apptainer", "is not on the PATH"),
        ([], False, "./apptainer", "containers/image.sh online"),
    ],
)
def test_what_is_missing_is_said(checkout, arguments, wheels, apptainer, said):
    if wheels:
        add_wheel(checkout)
    done = image(checkout, *arguments, APPTAINER=apptainer)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (checkout / "containers" / "kvpipe.sif").exists()


# ---------------------------------------------------------------- which build of torch
PIP = """#!/bin/sh
for word; do last=$word; done
echo "$last" >> asked
case $last in $REFUSED) exit 1 ;; esac
"""


@pytest.mark.parametrize(
    ("variant", "refused", "asked"),
    [
        ("cuda", "none", ["torch==T"]),
        ("cpu", "none", ["torch==T+cpu"]),
        ("cpu", "torch*+cpu", ["torch==T+cpu", "torch==T"]),
    ],
)
def test_a_cpu_build_is_asked_for_by_its_name_where_the_index_has_it(checkout, variant, refused, asked):
    (checkout / "pip").write_text(PIP, encoding="utf-8")
    (checkout / "pip").chmod(0o755)
    done = image(checkout, "wheelhouse", VARIANT=variant, PYTHON="./pip", WHEELHOUSE=".", REFUSED=refused)
    assert done.returncode == 0, done.stderr
    (torch,) = [x for x in (ROOT / "containers/image.lock").read_text().splitlines() if x.startswith("torch==")]
    found = (checkout / "asked").read_text(encoding="utf-8").splitlines()
    assert found == [*(word.replace("torch==T", torch) for word in asked), "containers/image.lock"]


def test_an_image_with_another_build_of_torch_fails_its_test():
    other = "cpu" if torch.version.cuda else "cuda"
    line = [sys.executable, str(ROOT / "containers" / "selftest.py"), other]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"not VARIANT={other}: name an index that has it" in done.stderr


def test_what_the_image_is_named_by_has_no_tools_for_development():
    """A formatter's new version would rename it, and run everything again."""
    names = {line.split("==")[0] for line in (ROOT / "containers/image.lock").read_text().splitlines()}
    assert not names & {"ruff", "mypy", "pytest", "black", "snakefmt", "pre-commit", "import-linter"}
    assert {"torch", "transformers", "accelerate", "snakemake", "sentencepiece"} <= names


def test_modules_of_the_host_do_not_come_before_the_images_packages():
    definition = (ROOT / "containers" / "kvpipe.def").read_text(encoding="utf-8")
    assert "unset PYTHONPATH" in definition.partition("%environment")[2].partition("%runscript")[0]
