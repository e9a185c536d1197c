"""containers/image.sh with a stand-in for Apptainer: names, what is passed on, what it says when something is missing."""

import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APPTAINER = """#!/bin/sh
echo "$@" >> calls
for word; do before=$last; last=$word; done
echo "an image" > "$before"
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "containers").mkdir()
    for name in ("containers/image.sh", "containers/kvpipe.def", "requirements.lock"):
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
    content = (checkout / "requirements.lock").read_bytes() + (checkout / "containers/kvpipe.def").read_bytes()
    first = image(checkout, "name").stdout
    assert first == f"containers/kvpipe-cpu-{sha256(content).hexdigest()[:12]}.sif\n"
    for name in ("requirements.lock", "containers/kvpipe.def"):
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
