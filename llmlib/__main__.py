"""`python -m llmlib`."""

import sys

from llmlib.cli import main

sys.exit(main())
