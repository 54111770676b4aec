"""`python -m llmlib`."""

import sys

from llmlib.cli import main

for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows ? in its place
sys.exit(main())
