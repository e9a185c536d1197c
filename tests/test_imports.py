"""What a step does not need is not imported: start-up is part of every job's time."""

import subprocess
import sys

import pytest

HEAVY = ("datasets", "lm_eval", "pyarrow.dataset", "matplotlib")


@pytest.mark.parametrize(
    "module", ["kvpipe.evaluate.score", "kvpipe.data.build", "kvpipe.evaluate.harness", "kvpipe.evaluate.sandbox.run"]
)
def test_optional_and_heavy_packages_wait_until_they_are_needed(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
