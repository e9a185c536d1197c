"""Which walls programs that a model wrote would have here."""

from __future__ import annotations

from kvpipe.config import Config
from kvpipe.doctor.asked import Asked
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding
from kvpipe.evaluate.sandbox.run import DESCRIPTION, SandboxError, choose


def examine_walls(config: Config, asked: Asked) -> list[Finding]:
    """A finding on the sandbox; none where no program is run. Where jobs run in an image, it is theirs that counts."""
    sandbox = config.evaluate.sandbox
    if not sandbox.run_code:
        return []
    try:
        walls = choose(sandbox)
    except SandboxError as error:
        return [
            Finding("sandbox", WARNING if asked.containers else FAIL, f"on this machine {error}", "install bubblewrap")
        ]
    return [Finding("sandbox", WARNING if walls == "none" else OK, DESCRIPTION[walls])]
