"""docs/models.md is true: its commands are options that exist."""

import re
from pathlib import Path

from typer.main import get_command

from kvpipe.cli import app as cli

DOC = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")


def test_options_in_the_commands_exist():
    commands = get_command(cli.app).commands
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", DOC, flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    found = [m for line in lines if (m := re.search(r"kvpipe ([a-z-]+)((?: --?[\w-]+.*)?)", line.split("#")[0]))]
    assert {m[1] for m in found} >= {"lock", "models", "train", "publish"}
    for match in found:
        known = {option for parameter in commands[match[1]].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", match[2])) <= known, match[0]
