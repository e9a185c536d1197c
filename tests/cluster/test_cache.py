"""Where the cluster's cache lies; no cluster is needed."""

import cluster


def test_a_relative_cache_is_that_of_the_folder_pytest_was_started_in(tmp_path, monkeypatch):
    """build.sh changes into it, and names files in it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVPIPE_CLUSTER_CACHE", "a/cache")
    assert cluster.cache_folder() == tmp_path / "a" / "cache"
