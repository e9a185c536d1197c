"""The plan of an experiment: files, provenance, jobs. No torch, but for `device`."""
