"""`python -m llmlib.interactive NOTEBOOK…`: bring the scripts inlined in notebooks up to date."""

import sys
from pathlib import Path

from llmlib.interactive import refresh

for name in sys.argv[1:]:
    print(name, "updated" if refresh(Path(name)) else "current")
