"""Write the repository's address into the cells that install llmlib on Colab:  address.py owner/name

Whoever hosts the book runs this once; until then the cells hold OWNER/REPOSITORY.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"git\+https://github\.com/[\w.-]+/[\w.-]+")


def write(repository: str) -> list[Path]:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        sys.exit(f"REPOSITORY={repository!r} is not of the form owner/name, as in make address REPOSITORY=owner/name")
    changed = []
    for path in sorted([*ROOT.glob("chapters/*.ipynb"), *ROOT.glob("book/*.ipynb")]):
        text = path.read_text()
        new = ADDRESS.sub(f"git+https://github.com/{repository}", text)
        if new != text:
            path.write_text(new)
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in write(sys.argv[1]):
        print(path.relative_to(ROOT))
