"""`{notation}`: the shape alphabet, read from the docstring of `llmlib` so that it is written only once."""

import re

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import llmlib


def alphabet() -> list[tuple[str, str]]:
    """(letter, meaning) from the indented lines of llmlib's docstring, whose columns are at least two spaces apart."""
    lines = [line for line in llmlib.__doc__.splitlines() if line.startswith("    ")]
    cells = [cell for line in lines for cell in re.split(r" {2,}", line.strip())]
    return [tuple(cell.split(" ", 1)) for cell in cells]


class Notation(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        rows = [self.row(letter, meaning) for letter, meaning in alphabet()]
        group = nodes.tgroup("", *(nodes.colspec(colwidth=w) for w in (10, 90)), cols=2)
        group += nodes.thead("", nodes.row("", *(nodes.entry("", nodes.paragraph(text=t)) for t in ("Letter", "Axis"))))
        group += nodes.tbody("", *rows)
        return [nodes.table("", group, classes=["notation"])]

    def row(self, letter: str, meaning: str) -> nodes.row:
        cells = (nodes.literal(text=letter), nodes.Text(meaning))
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


def setup(app):
    app.add_directive("notation", Notation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
