"""Write docs/messages.md: what is said of every case of bad input."""

import tempfile
from pathlib import Path

from bad_input_run import build, outcome
from bad_input_table import TABLE, page

OUT = Path(__file__).resolve().parents[1] / "docs" / "messages.md"


def main() -> None:
    """Run every case, and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        build(base)
        cases = [case for group in TABLE.values() for case in group]
        found = {case.what: outcome(case, base, Path(folder) / "x").message for case in cases}
    OUT.write_text(page(found), encoding="utf-8")
    print(f"{OUT}: {len(found)} cases")


if __name__ == "__main__":
    main()
