"""What names, data and logs bring along reaches no terminal as a command, and input that would run for ever ends in one line."""

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from tiny import build, values

from kvpipe.cli.app import main
from kvpipe.config import ConfigError, ScoringConfig, load, parse, with_lock
from kvpipe.config.errors import printable
from kvpipe.data import patterns
from kvpipe.evaluate.scorers.answers import extract
from kvpipe.experiment.launch import check_environment
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.report.status import overview
from kvpipe.train.card import escaped

RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
EVIL = "a\x1b[2J\x9b31m\x07\r\u202eb"


def test_controls_are_escaped_and_nothing_else():
    assert printable(EVIL) == r"a\x1b[2J\x9b31m\x07\r\u202eb"
    assert printable("π ≈ 3\tund\n▁文") == "π ≈ 3\tund\n▁文"


def kvpipe(*arguments, **environment):
    """A command of its own process."""
    return subprocess.run(
        [sys.executable, "-m", "kvpipe", *map(str, arguments)], capture_output=True, text=True, timeout=120,
        check=False, env={k: v for k, v in os.environ.items() if k != "KVPIPE_TRACEBACK"} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("what", ["a key", "a value", "a line of data", "a column"])
def test_errors_are_shown_escaped(tmp_path, capsys, monkeypatch, what):
    settings = values(tmp_path) | {"arms": {"control": {}}}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('"\x9b2J"\n' if what == "a line of data" else json.dumps({EVIL: "x", "b": "c"}) + "\n")
    if what == "a key":
        settings["seeds" + EVIL] = 1
    elif what == "a value":
        settings["student"] = EVIL
    else:
        settings["data"] = {
            "sources": [
                {
                    "kind": "files",
                    "task": "t",
                    "train": str(rows),
                    "validation": str(rows),
                    "test": str(rows),
                    "columns": {"prompt": "p"},
                }
            ]
        }
    config = tmp_path / "c.json"
    config.write_text(json.dumps(settings))
    monkeypatch.setattr(
        sys, "argv", ["kvpipe", "data", "--config", str(config), "--results", str(tmp_path / "results")]
    )
    monkeypatch.delenv("KVPIPE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "x9b" in said.err and not RAW.search(said.out + said.err), said


def test_the_status_shows_logs_escaped(tmp_path):
    dag, paths = Dag(parse(values(tmp_path))), Paths(tmp_path / "results")
    arm, seed = next(iter(dag.cells))
    log = paths.root / "logs" / "train" / arm / f"seed{seed}.log"
    log.parent.mkdir(parents=True)
    log.write_text("RuntimeError: [red]x[/red] [/] \\ \x9b31m \x1b[2J\x07\n", encoding="utf-8")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(overview(dag, paths))
    shown = console.export_text()
    assert not RAW.search(shown) and r"[red]x[/red] [/] \ \x9b31m \x1b[2J\x07" in shown


def test_a_card_shows_names_as_they_are():
    assert escaped("a|<img src=x> [x](y) `z`\n# b") == r"a\|\<img src=x\> \[x\](y) \`z\` \# b"
    assert escaped("exp1, λ = 0.5") == "exp1, λ = 0.5"


PAIRS = list(zip("abcdefgh", "bcdefghi", strict=True))
BOMBS = {
    "lists": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in PAIRS),
    "mappings": "a: &a {k: x}\n"
    + "".join(f"{y}: &{y} {{{', '.join(f'k{i}: *{x}' for i in range(9))}}}\n" for x, y in PAIRS),
    "merges": "a: &a {k: x}\n"
    + "".join(f"{y}: &{y} {{<<: [{', '.join([f'*{x}'] * 9)}]}}\n" for x, y in PAIRS),
    "itself": "seeds: &a [*a]\n",
    "levels": "seeds: " + "[" * 10_000 + "]" * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_document_that_explodes_is_refused(tmp_path, name):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    started = time.process_time()
    with pytest.raises(ConfigError, match=r"bomb\.yaml.*(entries|too deeply)") as error:
        load(path)
    assert "\n" not in str(error.value) and time.process_time() - started < 60


def test_aliases_are_allowed_and_what_snakemake_has_read_is_bounded(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(values(tmp_path) | {"seeds": 0})[:-1].replace('"seeds": 0', '"seeds": &s [0, 1]') + "}")
    assert load(path).seeds == [0, 1]
    bomb: list = ["x"]
    for _ in range(20):
        bomb = [bomb] * 9
    with pytest.raises(ConfigError, match=r"c\.yaml: .*entries"):
        with_lock({"seeds": bomb}, [path])


def test_an_expression_that_finds_no_end_is_ended(monkeypatch):
    monkeypatch.setattr(patterns, "LIMIT_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"evaluate\.answer_pattern .*no end within 0\.2 s"):
        extract("a" * 60, ScoringConfig(answer_pattern="((a+)+)$b"))
    assert extract("#### 7", ScoringConfig()) == "7"


def test_variables_of_another_jobs_launcher_are_refused():
    check_environment({})
    check_environment({"WORLD_SIZE": "1", "RANK": "0"})
    every = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    check_environment(every)
    for found in ({"RANK": "0", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"}, every | {"MASTER_ADDR": ""}):
        with pytest.raises(ValueError, match=r"another job's launcher.*env -u") as error:
            check_environment(found)
        assert "\n" not in str(error.value)


def test_no_traceback_for_0(tmp_path):
    for value, shown in (("0", False), ("1", True)):
        done = kvpipe("data", "--config", tmp_path / "none.yaml", KVPIPE_TRACEBACK=value)
        assert done.returncode == 1 and ("Traceback" in done.stderr) is shown


# ---------------------------------------------------------------- how a command ends
HERE = Path(__file__).resolve().parents[2]
LAUNCHED = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "KVPIPE_MEETING_SECONDS": "2"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_never_comes_ends_the_meeting_in_one_line(tmp_path, rank):
    config = tmp_path / "c.json"
    config.write_text(json.dumps(values(tmp_path)))
    launched = LAUNCHED | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": free_port()}
    done = kvpipe("train", "--config", config, "--results", tmp_path / "r", "--arm", "control", **launched)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("(set KVPIPE")]
    assert re.match(rf"ConfigError: .*RANK={rank}.*WORLD_SIZE=2.*within 2 s.*env -u RANK", line), done.stderr
    assert not (tmp_path / "r").exists(), "nothing was made before"


def test_an_interruption_is_one_line(tmp_path):
    """The signal comes while modules are imported: a module of ours sends it."""
    (tmp_path / "rich.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    script = "import sys\nsys.argv[1:] = ['status']\nfrom kvpipe.__main__ import main\nmain()"
    program = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{HERE}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
@pytest.mark.parametrize(
    ("after", "status", "ends"),
    [
        ("data …", 130, "interrupted"),
        ("step 2/", 75, r"stopped by signal 2 after step \d+; run the same command to go on"),
    ],
    ids=["preparing", "training"],
)
def test_ctrl_c_ends_in_one_line(tmp_path, after, status, ends, terminal):
    """Of a process of its own, which obeys SIGINT even where this one was started in the background."""
    config = tmp_path / "c.json"
    settings = values(tmp_path)
    settings["train"] |= {"steps": 100_000, "eval_every": 2, "checkpoint_every": 100_000}
    config.write_text(json.dumps(settings))
    if after == "step 2/":
        build(tmp_path)
    command = [sys.executable, "-m", "kvpipe", "train", "--config", str(config), "--results", str(tmp_path / "results")]
    environment = {k: v for k, v in os.environ.items() if k != "KVPIPE_TRACEBACK"}
    environment |= {"PYTHONUNBUFFERED": "1", "TERM": "xterm", "COLUMNS": "120"}
    ours, theirs = pty.openpty() if terminal else os.pipe()
    with subprocess.Popen(
        [*command, "--arm", "control"], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        os.close(theirs)
        timer = threading.Timer(300, process.kill)
        timer.start()
        said, sent = b"", False
        with suppress(OSError):  # of a terminal whose other end is closed
            while more := os.read(ours, 4096):
                said += more
                if after.encode() in said and not sent:
                    sent = True
                    process.send_signal(signal.SIGINT)
    timer.cancel()
    os.close(ours)
    assert sent and process.returncode == status, said.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode()).replace("\r", "\n")
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    # on a terminal what is said may follow the end of a progress bar, whose cursor moves are left out here
    assert len([line for line in lines if re.search(rf"(?:{ends})\Z", line)]) == 1, lines[-5:]
    assert "Traceback" not in plain and "KeyboardInterrupt" not in plain
    if terminal:
        assert said.rfind(b"\x1b[?25h") >= said.rfind(b"\x1b[?25l"), "the cursor is shown again"
    else:
        assert re.fullmatch(ends, lines[-1]), "nothing is said after it"


def test_the_systems_python_says_to_activate_the_environment(tmp_path):
    """Without packages: no traceback, but what to do."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "kvpipe", "status"], capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(HERE), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r".* has no package \w+: activate the environment .*make install.*\n", done.stderr), done.stderr


def test_a_reader_that_goes_away_ends_training_quietly(tmp_path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps(values(tmp_path)))
    command = [sys.executable, "-m", "kvpipe", "train", "--config", str(config), "--results", str(tmp_path / "r")]
    environment = {k: v for k, v in os.environ.items() if k != "KVPIPE_TRACEBACK"} | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--arm", "control"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "data …\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_python_without_docstrings_is_refused_in_one_line():
    done = kvpipe("status", PYTHONOPTIMIZE="2")
    assert done.returncode == 1 and done.stderr.startswith("ValueError: PYTHONOPTIMIZE=2 (python -OO)"), done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_too_little_memory_is_one_line(tmp_path):
    """`ulimit -v`: less than torch needs to be loaded."""
    config = tmp_path / "c.json"
    config.write_text(json.dumps(values(tmp_path)))
    command = f"ulimit -v 600000; exec {sys.executable} -m kvpipe train --arm control --config {config} --results {tmp_path}/r"
    environment = {k: v for k, v in os.environ.items() if k != "KVPIPE_TRACEBACK"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2, lines
    error, hint = lines
    assert re.match("(ImportError|MemoryError|OSError|OutOfMemory): ", error) and hint.startswith("(set KVPIPE"), done


def test_a_document_that_explodes_is_refused_by_snakemake_too(tmp_path):
    """Of lists; one of mappings Snakemake writes out before any of our lines runs."""
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS["lists"])
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--configfile", str(path), "--directory", str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False, cwd=HERE,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said
    assert len([line for line in said.splitlines() if "entries with all aliases" in line]) == 1, said
