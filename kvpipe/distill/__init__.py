"""From teachers' caches to a loss: projectors, fusion, objectives."""
