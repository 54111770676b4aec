"""Run a chapter's whole experiment, which goes on where it was interrupted.

`record.py 09-scaling-laws` runs book/recorded/scaling_laws.py.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def script(chapter: str) -> Path:
    """The script of a chapter, named with or without its number, with - or _."""
    scripts = {path.stem.replace("_", "-"): path for path in sorted((ROOT / "book" / "recorded").glob("*.py"))}
    name = re.sub(r"^\d\d-", "", chapter.replace("_", "-"))
    if name not in scripts:
        known = ", ".join(scripts)
        sys.exit(
            f"CHAPTER={chapter!r} has no experiment; name one of {known}: make record CHAPTER={next(iter(scripts))}"
        )
    return scripts[name]


if __name__ == "__main__":
    sys.exit(subprocess.run([sys.executable, script(sys.argv[1]), *sys.argv[2:]], cwd=ROOT).returncode)
