"""What the chapters are made with: figures of one style, source, checks, exercises, tables, recorded measurements.

A chapter starts with

    from llmlib import notebook
    notebook.style()

and then uses `show`, `check`, `exercise`, `table`, `model_table`, `matrix`, `heatmap`, `lines`, `boxes`,
`expert_loads`, `colours`, `recorded`, `full_size`, `attention_weights` and `largest_logits` from here.
`llmlib.notebook.recording` is for the scripts behind `make record CHAPTER=…`.
"""

from llmlib.notebook.checking import check
from llmlib.notebook.exercises import exercise, verdict
from llmlib.notebook.figures import boxes, colours, expert_loads, heatmap, lines, style
from llmlib.notebook.looking import attention_calls, attention_weights, largest_logits
from llmlib.notebook.records import full_size, recorded, recording, time_on_gpu
from llmlib.notebook.tables import matrix, model_table, show, table

__all__ = [
    "attention_calls",
    "attention_weights",
    "boxes",
    "check",
    "colours",
    "exercise",
    "expert_loads",
    "full_size",
    "heatmap",
    "largest_logits",
    "lines",
    "matrix",
    "model_table",
    "recorded",
    "recording",
    "show",
    "style",
    "table",
    "time_on_gpu",
    "verdict",
]
