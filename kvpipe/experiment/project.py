"""A folder of one's own: what `kvpipe init` writes, and the recipes (overlays) that are shipped beside it.

The package carries the workflow, the configurations and the profiles under `shipped/`, so that an installed wheel needs
no checkout. No torch: a project's Snakefile imports this.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Literal

from jinja2 import Template

from kvpipe import __version__
from kvpipe.config.errors import nearest
from kvpipe.config.section import ConfigError

SHIPPED = Path(__file__).parents[1] / "shipped"
SNAKEFILE = SHIPPED / "workflow" / "Snakefile"
"""The workflow, for `module kvpipe:`."""
RECIPES = SHIPPED / "config" / "recipes"
TemplateName = Literal["embedded", "smollm2", "hpc"]
CONFIGURATIONS = {"embedded": "config.yaml", "smollm2": "smollm2.yaml", "hpc": "hpc.yaml"}
"""Template → the shipped configuration that becomes the project's `config/config.yaml`."""
IN_IMAGE = re.compile(r"^(?=(?:software-deployment-method|apptainer-args):)", re.MULTILINE)
"""Lines of a profile that start jobs in the image, which has the packages of a checkout but not kvpipe itself."""


def init(folder: Path, template: TemplateName) -> list[Path]:
    """Write a project: configuration, Snakefile, profile, README.

    Args:
        folder: its place; made if it is not there.
        template: the experiment that it begins with.

    Returns:
        The files, relative to the folder.

    Raises:
        FileExistsError: one of them is there already; nothing is written.
    """
    texts, copies = _texts(folder.resolve().name, template), _copies(template)
    files = [Path(name) for name in (*texts, *copies)]
    if found := [str(folder / file) for file in files if (folder / file).exists()]:
        raise FileExistsError(f"{', '.join(found)}: there already, and nothing was written; name a new folder")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name, source in copies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    return files


def _texts(name: str, template: TemplateName) -> dict[str, str]:
    """File → text, of those that are not plain copies."""
    shipped = f"config/{CONFIGURATIONS[template]}"
    found = {path.name: path.read_text(encoding="utf-8") for path in (SHIPPED / "project").iterdir()}
    config = (SHIPPED / shipped).read_text(encoding="utf-8").replace(shipped, "config/config.yaml")
    texts = {
        "README.md": Template(found["README.md.jinja"], trim_blocks=True, keep_trailing_newline=True).render(
            name=name, template=template, version=__version__
        ),
        ".gitignore": found["gitignore"],
        "workflow/Snakefile": found["Snakefile"],
        "config/config.yaml": f"# yaml-language-server: $schema=schema.json\n{config}",
    }
    if template == "hpc":
        profile = (SHIPPED / "profiles" / "slurm" / "config.yaml").read_text(encoding="utf-8")
        texts["profiles/slurm/config.yaml"] = IN_IMAGE.sub("# ", profile)
    return texts


def _copies(template: TemplateName) -> dict[str, Path]:
    """File → what it is a copy of."""
    names = ["config/README.md", "config/schema.json", "workflow/profiles/default/config.yaml"]
    if template == "embedded":
        names += [str(path.relative_to(SHIPPED)) for path in (SHIPPED / "config/embedded").glob("*/*")]
    return {name: SHIPPED / name for name in sorted(names)}


def shipped_recipes() -> dict[str, str]:
    """Name → what it is over, by the first sentence of its file."""
    files = sorted(RECIPES.glob("*.yaml"))
    heads = {path.stem: path.read_text(encoding="utf-8").split("\n\n")[0].replace("\n# ", " ") for path in files}
    return {name: re.split(r"\.(?:\s|$)", head.removeprefix("# "), maxsplit=1)[0] for name, head in heads.items()}


def copy_recipe(name: str, out: Path) -> Path:
    """Copy a recipe to a file, or into a folder.

    Raises:
        ConfigError: no such recipe; names the nearest.
        FileExistsError: the file is there already.
    """
    if name not in shipped_recipes():
        raise ConfigError(f"no recipe {name!r}{nearest(name, shipped_recipes())}")
    path = out / f"{name}.yaml" if out.is_dir() or not out.suffix else out
    if path.exists():
        raise FileExistsError(f"{path}: there already; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(RECIPES / f"{name}.yaml", path)
    return path
