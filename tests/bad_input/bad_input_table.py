"""The table of bad input, in the order of its page, and the page."""

import re

import cases_artefacts
import cases_config
import cases_data
import cases_use
from bad_input_run import Case

TABLE: dict[str, list[Case]] = {
    "The configuration file": cases_config.FILES,
    "Its keys": cases_config.KEYS,
    "Followed into a run": cases_config.FOLLOWED,
    "Files of rows": cases_data.FILES,
    "Data sets": cases_data.FOLDERS,
    "Model folders": cases_artefacts.FOLDERS,
    "Artefacts": cases_artefacts.ARTEFACTS,
    "Results": cases_artefacts.FINISHED,
    "Full disks, and two at once": cases_use.FAULTS,
    "The command line": cases_use.COMMANDS,
    "The environment": cases_use.ENVIRONMENT,
    "The doctor": cases_use.DOCTOR,
    "What repairs itself": cases_use.REPAIRED,
}
HEAD = """# What is said of bad input

Written by `make messages` from the cases of `tests/bad_input/`, which `make test` runs: each ends with a
status that is not 0 and with these words, without a traceback, and leaves what was computed as it was.
`KVPIPE_TRACEBACK=1` shows the traceback too. What is made again, or read from the checkpoint before, ends well and
says so; those rows stand last, under *What repairs itself*. What needs a process of its own (Ctrl-C, `ulimit -v`, a reader
that goes away, `PYTHONOPTIMIZE`) is in `tests/cli/test_escapes.py`.
"""


def page(messages: dict[str, str]) -> str:
    """The page.

    Args:
        messages: what is wrong → what is said.
    """
    parts = [HEAD]
    for group, cases in TABLE.items():
        parts.append(f"\n## {group}\n\n| input | command | message |\n|---|---|---|\n")
        for case in cases:
            said = re.sub(r"\b(?=[0-9a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,}\b", "…", messages[case.what])
            parts.append(row(case, said))
    return "".join(parts)


def row(case: Case, said: str) -> str:
    """A row of the page."""
    cells = (case.what, f"`kvpipe {case.command}`", said)
    return "| " + " | ".join(re.sub(r"([|<>])", r"\\\1", " ".join(cell.split())) for cell in cells) + " |\n"


def messages(page: str) -> dict[tuple[str, str], str]:
    """(what is wrong, command) → what is said, of a page."""
    plain = re.sub(r"\\([<>])", r"\1", page)
    rows = re.findall(r"^\| (.*?) (?<!\\)\| (`kvpipe .*?`) (?<!\\)\| (.*) \|$", plain, re.MULTILINE)
    return {(what, command): said.replace("\\|", "|") for what, command, said in rows}
