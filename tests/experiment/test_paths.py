"""File names are said once, in kvpipe/experiment/paths.py."""

import re
from pathlib import Path

import pytest

from kvpipe.experiment.paths import Paths

ROOT = Path(__file__).parents[2]
NAMES = re.compile(
    r"""["'/](?:results/|MANIFEST\.json|history\.jsonl|cost\.json|index\.json|audit\.json|doctor\.json|probe\.json"""
    r"""|report\.html|sources\.json|arms\.csv|contrasts\.csv|untrained\.parquet)|\.root / ["']"""
)
"""In quotes; the backquotes of a docstring are words."""


def test_no_other_module_or_rule_names_an_artefact():
    files = [*(ROOT / "kvpipe").rglob("*.py"), *(ROOT / "workflow").rglob("*.smk"), ROOT / "workflow" / "Snakefile"]
    assert len(files) > 90
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if path.name != "paths.py" and NAMES.search(re.sub(r"`[^`]*`", "", line))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [n for n in vars(Paths) if not n.startswith("_") and n != "root"])
def test_every_file_is_below_the_folder_and_takes_a_wildcard(name):
    """So that a rule and the code say a file by the same method."""
    member = getattr(Paths, name)
    if isinstance(member, property):
        found = member.fget(Paths(Path("elsewhere")))
        assert all(path.parts[0] == "elsewhere" for path in (found if isinstance(found, list) else [found]))
        return
    wanted = [n for n in member.__code__.co_varnames[1 : member.__code__.co_argcount] if n != "artefact"]
    if not wanted:
        return
    pattern = str(member(Paths(Path("elsewhere")), *(f"{{{n}}}" for n in wanted)))
    values = dict.fromkeys(wanted, "7")
    made = str(member(Paths(Path("elsewhere")), *values.values()))
    padded = pattern.replace("{shard}", "00007").format(**values)
    assert made == padded and made.startswith("elsewhere/")
