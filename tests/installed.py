"""What pip writes of plugins/cluster, so that tests find the extra whether it is installed or not."""

import tomllib
from pathlib import Path

PLUGIN = Path(__file__).parents[1] / "plugins" / "cluster"


def write_metadata(folder: Path) -> None:
    """The requirements and the entry point of its pyproject.toml, into a folder for the path of Python."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / "kvpipe_cluster-0.1.0.dist-info"
    info.mkdir(parents=True)
    needed = "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n{needed}")
    for group, found in project["entry-points"].items():
        lines = "".join(f"{name} = {value}\n" for name, value in found.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
