"""API pages from llmlib's docstrings, which are written for a terminal: plain text, aligned columns, Unicode maths.

What is between single backticks becomes code, `name  meaning` columns become definition lists, indented blocks stay as
they are, and everything else is escaped, so that no docstring can break the build. An arXiv number that the
bibliography knows becomes a citation.
"""

import re
from itertools import groupby
from pathlib import Path

from book_citations import references
from sphinx.ext.autodoc import FunctionDocumenter

from llmlib.ops import Op

COLUMNS = re.compile(r"^(\S(?:.{0,72}?\S)?) {2,}(\S.*)$")
PARAMETERS = re.compile(r"<dl>\s*((?:<dd>(?:(?!</?d[dl]>).)*</dd>\s*)+)</dl>", re.S)
ARXIV = re.compile(r"arXiv[: ]\s?(\d{4}\.\d{4,5})")


def inline(text: str, known: set[str]) -> str:
    """One paragraph of plain text as reStructuredText."""
    parts = re.split(r"`+([^`]+)`+", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"\\ ``{part.strip()}``\\ "
            continue
        escaped = re.sub(r"([\\*_|`])", r"\\\1", part)
        parts[i] = ARXIV.sub(lambda m: citation(m, known), escaped)
    return "".join(parts)


def citation(match: re.Match, known: set[str]) -> str:
    if f"arxiv:{match[1]}" not in known:
        return match[0]
    return f"`arXiv:{match[1]} <https://arxiv.org/abs/{match[1]}>`__"


def definitions(block: list[str], known: set[str]) -> list[str]:
    """Aligned columns as a definition list; lines that start with a space go on with the meaning above."""
    out = []
    for line in block:
        term = COLUMNS.match(line)
        if term:
            out += [inline(f"`{term[1].strip('`')}`", known).removeprefix("\\ "), f"   {inline(term[2], known)}"]
        else:
            out.append(f"   {inline(line.strip(), known)}")
    return out


def paragraphs(block: list[str], known: set[str]) -> list[str]:
    """A block without blank lines: columns, prose, and runs of indented lines kept as they are."""
    if COLUMNS.match(block[0]):  # prose may follow them at once
        prose = (i for i, line in enumerate(block) if not (COLUMNS.match(line) or line.startswith("  ")))
        end = next(prose, len(block))
        return [*definitions(block[:end], known), "", *(paragraphs(block[end:], known) if block[end:] else [])]
    out = []
    for indented, lines in groupby(block, key=lambda line: line.startswith("  ")):
        lines = list(lines)
        if indented:
            out += ["::", "", *(f"   {line}" for line in lines), ""]
        else:
            # a backtick pair may span two lines, so the run is converted as one paragraph
            out += [*inline("\n".join(lines), known).split("\n"), ""]
    return out


def convert(lines: list[str], known: set[str]) -> list[str]:
    out = []
    for blank, block in groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            out += paragraphs(list(block), known)
    return out


def process(app, what, name, obj, options, lines) -> None:
    bibfile = Path(app.srcdir, app.config.bibtex_bibfiles[0])
    lines[:] = convert(lines, set(references(str(bibfile), bibfile.stat().st_mtime)))
    if isinstance(obj, Op):
        lines += [f"Kernels: {', '.join(f'``{k}``' for k in [*(t.name for t in obj.twins), 'reference'])}.", ""]


def plain_parameters(app, pagename, templatename, context, doctree) -> None:
    """Sphinx writes a long signature's parameters as a definition list without terms, which HTML doesn't allow."""
    if "sig-param" in context.get("body", ""):
        context["body"] = PARAMETERS.sub(
            lambda m: '<div class="parameters">' + m[1].replace("<dd>", "<div>").replace("</dd>", "</div>") + "</div>",
            context["body"],
        )


class OpDocumenter(FunctionDocumenter):
    """An op is documented as the function that it stands for."""

    objtype = "op"
    directivetype = "function"
    priority = FunctionDocumenter.priority + 10

    @classmethod
    def can_document_member(cls, member, *_) -> bool:
        return isinstance(member, Op)


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.add_autodocumenter(OpDocumenter)
    app.connect("autodoc-process-docstring", process)
    app.connect("html-page-context", plain_parameters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
