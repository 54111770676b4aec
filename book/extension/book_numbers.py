"""Chapters are numbered by their files (chapters/01-attention is chapter 1), and figures and equations within them.

A link to a planned chapter that isn't in the table of contents yet shows as plain text; it becomes a link when the
chapter arrives.
`{chapters}` lists, on the front page, the chapters of the table of contents: number, title and first sentence.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

CHAPTER = re.compile(r"chapters/(\d+)-")
PLANNED = (
    "00-introduction", "01-attention", "02-attention-variants", "03-position-encodings", "04-feed-forward",
    "05-normalisation", "06-mixture-of-experts", "07-state-space-models", "08-hybrids", "09-scaling-laws",
    "10-model-families", "11-architecture-comparison", "12-kernels",
)  # fmt: skip
SENTENCE = re.compile(r"(.+?[.?!])(?:\s|$)", re.S)


def number(docname: str) -> int | None:
    """The chapter's number; None for a page that is not a chapter."""
    match = CHAPTER.match(docname)
    return int(match[1]) if match else None


def renumber(app, env) -> None:
    """Sphinx counts through the whole book: count within each page, and put the chapter's number before."""
    for docname, kinds in env.toc_fignumbers.items():
        chapter = number(docname)
        before = () if chapter is None else (chapter,)
        for figures in kinds.values():
            for count, name in enumerate(sorted(figures, key=figures.get), start=1):
                figures[name] = (*before, count)


class PlannedChapters(SphinxPostTransform):
    default_priority = 8  # before MyST resolves its links

    def run(self, **kwargs) -> None:
        for node in list(self.document.findall(addnodes.pending_xref)):
            name = node["reftarget"].split("#")[0].rsplit("/", 1)[-1].removesuffix(".ipynb")
            if name in PLANNED and f"chapters/{name}" not in self.env.found_docs:
                node.replace_self(nodes.inline("", "", *node[0].children, classes=["planned"]))


class chapter_list(nodes.General, nodes.Element):  # noqa: N801 (docutils names nodes so)
    """Filled when every title is known."""


class Chapters(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # its content depends on the chapters
        return [chapter_list()]


def first_sentence(document: nodes.document) -> str:
    paragraph = next((p for p in document.findall(nodes.paragraph) if not p.get("classes")), None)
    text = " ".join(paragraph.astext().split()) if paragraph else ""
    match = SENTENCE.match(text)
    return match[1] if match else text


def fill(app, doctree, docname) -> None:
    for node in list(doctree.findall(chapter_list)):
        chapters = sorted(name for name in app.env.found_docs if number(name) is not None)
        items = [item(app, name, docname) for name in chapters]
        html = f'<ol class="chapters">{"".join(items)}</ol>' if items else ""
        node.replace_self(nodes.raw("", html, format="html"))


def item(app, name: str, docname: str) -> str:
    escape = app.builder.templates.environment.filters["e"]
    title = app.env.titles[name].astext()
    link = app.builder.get_relative_uri(docname, name)
    return (
        f'<li><span class="number">{number(name)}</span><div><a href="{link}">{escape(title)}</a>'
        f"<p>{escape(first_sentence(app.env.get_doctree(name)))}</p></div></li>"
    )


def page(app, pagename, templatename, context, doctree) -> None:
    context["book_page"] = pagename.removeprefix("book/").replace("/", "-")
    context["book_chapter"] = number(pagename)


def setup(app):
    app.add_post_transform(PlannedChapters)
    app.add_directive("chapters", Chapters)
    app.add_node(chapter_list)
    app.connect("env-check-consistency", renumber)
    app.connect("doctree-resolved", fill)
    app.connect("html-page-context", page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
