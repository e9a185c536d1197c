"""Provenance, and the hash of code that decides what Snakemake runs again."""

import subprocess
from functools import cache
from importlib.metadata import version

import pytest

from kvpipe.experiment import provenance

CACHED = ("code_hash", "reachable", "imports", "git_commit")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of four modules in the place of kvpipe; `write(name, source)` changes one and forgets what was read."""
    folder = tmp_path / "kvpipe"
    folder.mkdir()
    monkeypatch.setattr(provenance, "PACKAGE", folder)
    for name in CACHED:
        monkeypatch.setattr(provenance, name, cache(getattr(provenance, name).__wrapped__))

    def write(name, source):
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
        for cached in CACHED:
            getattr(provenance, cached).cache_clear()

    write("__init__", "")
    write("report/__init__", "")
    write("config", "X = 1\n")
    write("low", "def f(x):\n    return x + 1\n")
    write("high", "from kvpipe import low\nfrom kvpipe.config import X\n\ndef g():\n    return low.f(X)\n")
    write("late", "def h():\n    from kvpipe.high import g\n    return g()\n")
    write("alone", "import os\nimport kvpipe.low\n")
    return write


# ---------------------------------------------------------------- the hash
def test_words_and_layout_do_not_change_the_hash(package):
    before = provenance.code_hash("kvpipe.late")
    package(
        "low",
        '"""About f."""\n\n# a comment\n'
        + 'def f( x ) :\n    """Says what."""\n\n    return (x\n            + 1)  # why\n\n"""Said after."""\n',
    )
    assert provenance.code_hash("kvpipe.late") == before


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    return x + 2\n",
        "def f(x, y=0):\n    return x + 1\n",
        "def f(x):\n    print('a')\n    return x + 1\n",
        "Z = 'text that is used'\n\ndef f(x):\n    return x + 1\n",
    ],
)
def test_code_changes_the_hash_of_all_that_reach_it(package, source):
    before = {name: provenance.code_hash(f"kvpipe.{name}") for name in ("low", "high", "late", "alone", "report")}
    package("low", source)
    after = {name: provenance.code_hash(f"kvpipe.{name}") for name in before}
    assert [name for name in before if before[name] != after[name]] == ["low", "high", "late", "alone"]


def test_a_string_that_is_a_value_counts(package):
    package("low", "NAME = 'one'\n")
    before = provenance.code_hash("kvpipe.high")
    package("low", "NAME = 'two'\n")
    assert provenance.code_hash("kvpipe.high") != before


def test_the_configurations_own_code_does_not_count(package):
    """Its effect is among the params of every rule already."""
    before = provenance.code_hash("kvpipe.high")
    package("config", "X = 2\n")
    assert provenance.code_hash("kvpipe.high") == before


def test_templates_count_for_the_report_alone(package):
    package("report/render", "from kvpipe import low\n")
    before = provenance.code_hash("kvpipe.report.render"), provenance.code_hash("kvpipe.high")
    (provenance.PACKAGE / "report" / "template.html").write_text("<p>")
    provenance.code_hash.cache_clear()
    after = provenance.code_hash("kvpipe.report.render"), provenance.code_hash("kvpipe.high")
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_imports_are_found_in_every_form(package):
    assert provenance.imports("kvpipe.high") == {"kvpipe.low", "kvpipe.config"}
    assert provenance.imports("kvpipe.late") == {"kvpipe.high"}, "inside a function"
    assert provenance.imports("kvpipe.alone") == {"kvpipe.low"}
    assert provenance.reachable("kvpipe.late") == {"kvpipe.late", "kvpipe.high", "kvpipe.low"}
    assert set(provenance.modules()) == {"kvpipe", "kvpipe.report"} | {
        f"kvpipe.{name}" for name in ("config", "low", "high", "late", "alone")
    }


# ---------------------------------------------------------------- kvpipe itself
def test_training_does_not_hang_on_what_comes_after_it():
    found = provenance.reachable("kvpipe.train.trainer")
    later = {"evaluate", "answers", "stats", "tables", "audit", "status", "doctor", "show"}
    assert not {f"kvpipe.{name}" for name in later} & found
    assert not [name for name in found if name.startswith("kvpipe.report")]
    assert {
        "kvpipe.train.trainer",
        "kvpipe.distill.objective",
        "kvpipe.align.rope",
        "kvpipe.distill.losses",
        "kvpipe.cache.capture",
    } <= found


def test_statistics_hang_on_no_training_code():
    wing = {f"kvpipe.stats.{name}" for name in ("tables", "scores", "metrics", "dunnett", "bootstrap")}
    assert provenance.reachable("kvpipe.stats.tables") == {*wing, "kvpipe.experiment.files"}
    assert "kvpipe.train.trainer" not in provenance.reachable("kvpipe.evaluate.score")
    assert "kvpipe.stats.bootstrap" not in provenance.reachable("kvpipe.evaluate.score")


def test_every_module_has_a_hash():
    hashes = {name: provenance.code_hash(name) for name in provenance.modules() if name not in provenance.UNHASHED}
    assert all(len(found) == 16 for found in hashes.values())
    assert len(set(hashes.values())) == len(hashes)


# ---------------------------------------------------------------- where a result comes from
def test_description():
    found = provenance.describe(arm="full")
    assert found["arm"] == "full"
    assert found["packages"]["torch"] == version("torch")
    assert {"git_commit", "python", "container", "host", "platform"} <= set(found)


def test_the_commit_says_whether_files_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    provenance.git_commit.cache_clear()
    try:
        monkeypatch.delenv("KVPIPE_GIT_COMMIT", raising=False)
        assert provenance.git_commit() is None
        provenance.git_commit.cache_clear()
        monkeypatch.setenv("KVPIPE_GIT_COMMIT", "said by the image")
        assert provenance.git_commit() == "said by the image"
        git("init", "-q")
        (tmp_path / "a.py").write_text("1")
        git("add", "a.py")
        git("commit", "-qm", "a")
        (tmp_path / "__init__.py").write_text("")
        provenance.git_commit.cache_clear()
        assert provenance.git_commit() == "said by the image", "an environment inside somebody else's checkout"
        git("add", "__init__.py")
        git("commit", "-qm", "kvpipe itself")
        (tmp_path / "untracked").write_text("x")
        provenance.git_commit.cache_clear()
        assert provenance.git_commit() == git("rev-parse", "HEAD")
        (tmp_path / "a.py").write_text("2")
        provenance.git_commit.cache_clear()
        assert provenance.git_commit() == git("rev-parse", "HEAD") + "+changes"
    finally:
        provenance.git_commit.cache_clear()


def test_no_git_behind_a_folder_that_may_not_be_read(package, monkeypatch):
    """The system then says that it may not look, not that there is none."""

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied: 'git'")

    monkeypatch.setattr(provenance.subprocess, "run", refused)
    monkeypatch.setenv("KVPIPE_GIT_COMMIT", "said by the login node")
    assert provenance.git_commit() == "said by the login node"
