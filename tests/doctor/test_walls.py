"""The doctor says which walls programs that a model wrote would have here."""

import pytest
from tiny import values

from kvpipe.config import parse
from kvpipe.doctor import FAIL, OK, WARNING
from kvpipe.doctor.asked import Asked
from kvpipe.doctor.walls import examine_walls
from kvpipe.evaluate.sandbox.run import SandboxError


def found(tmp_path, **sandbox):
    config = parse(values(tmp_path) | {"evaluate": {"sandbox": sandbox}})
    return [(finding.status, finding.detail) for finding in examine_walls(config, Asked(None))]


def test_nothing_where_no_program_runs(tmp_path):
    assert not found(tmp_path)


@pytest.mark.parametrize("walls", ["bwrap", "own"])
def test_the_walls_of_this_machine(tmp_path, monkeypatch, walls):
    monkeypatch.setattr("kvpipe.doctor.walls.choose", lambda config: walls)
    ((status, detail),) = found(tmp_path, run_code=True)
    assert status == OK and ("bubblewrap's" if walls == "bwrap" else "kvpipe's own") in detail


def test_none_is_a_failure_unless_the_configuration_says_so(tmp_path, monkeypatch):
    def refused(config):
        raise SandboxError("programs cannot be run here")

    monkeypatch.setattr("kvpipe.doctor.walls.choose", refused)
    assert found(tmp_path, run_code=True) == [(FAIL, "on this machine programs cannot be run here")]
    monkeypatch.undo()
    assert found(tmp_path, run_code=True, walls="none")[0][0] == WARNING
