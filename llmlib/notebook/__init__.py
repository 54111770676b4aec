"""What the chapters are made with: figures of one style, source, checks, exercises, tables, recorded measurements.

A chapter starts with

    from llmlib import notebook
    notebook.style()

and then uses `show`, `check`, `exercise`, `table`, `model_table`, `matrix`, `heatmap`, `lines`, `boxes`, `colours`,
`recorded` and `full_size` from here. `llmlib.notebook.recording` is for the scripts behind `make record CHAPTER=…`.
"""

from llmlib.notebook.checking import check
from llmlib.notebook.exercises import exercise, verdict
from llmlib.notebook.figures import boxes, colours, heatmap, lines, style
from llmlib.notebook.records import full_size, recorded, recording
from llmlib.notebook.tables import matrix, model_table, show, table

__all__ = [
    "check",
    "colours",
    "boxes",
    "exercise",
    "full_size",
    "heatmap",
    "lines",
    "matrix",
    "model_table",
    "recorded",
    "recording",
    "show",
    "style",
    "table",
    "verdict",
]
