"""The lead of an arm over control, and the bits of its items."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mechanisms import bits, leads

from kvpipe.experiment.paths import Paths


def test_a_lead_is_the_mean_over_seeds_and_of_arms_with_all_of_them(tmp_path):
    paths = Paths(tmp_path)
    curves = {("control", 0): 3.0, ("control", 1): 2.0, ("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 1.0}
    for (arm, seed), last in curves.items():
        lines = [{"step": 0, "tokens": 0, "validation_loss": 4.0}, {"step": 9, "tokens": 9, "validation_loss": last}]
        paths.history(arm, seed).parent.mkdir(parents=True)
        paths.history(arm, seed).write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SimpleNamespace(seeds=[0, 1], control="control")
    found = leads(SimpleNamespace(arms=["control", "a", "b"], config=config), paths)
    assert found.to_dict() == {"a": {0: 0.0, 9: 0.5}}


def test_bits_are_of_all_bytes():
    items = pd.DataFrame({"nll": np.log([2.0, 8.0]), "bytes": [1, 3]})
    assert bits(items) == pytest.approx(1.0)
