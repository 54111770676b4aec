"""Turn ordinary links to papers into citations of the book's bibliography.

Chapters cite by a plain Markdown link, `[Vaswani et al. (2017)](https://arxiv.org/abs/1706.03762)`, which also reads
well in JupyterLab and on Colab. Here the link is led to the entry of `references.bib` with that `eprint` or `url`, with
the paper's title as its tooltip; the entry carries the link to the paper. An arXiv paper that is not in references.bib
is a warning, and warnings fail the build.
"""

import re
from functools import cache
from pathlib import Path

import pybtex.database
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)
ARXIV = re.compile(r"https?://(?:www\.)?arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5}|[a-z-]+/\d{7})(?:v\d+)?(?:\.pdf)?/?$")
PAGE = "book/bibliography"


def address(entry) -> str:
    """Where the paper is found; the same string for every way of writing an arXiv address."""
    return f"arxiv:{entry.fields['eprint']}" if "eprint" in entry.fields else entry.fields.get("url", "").rstrip("/")


@cache
def references(bibfile: str, modified: float) -> dict[str, tuple[str, str]]:
    """address → (key, title), over the whole of references.bib."""
    entries = pybtex.database.parse_file(bibfile).entries
    return {address(e): (key, re.sub(r"[{}]", "", e.fields["title"])) for key, e in entries.items()}


class LinkCitations(SphinxPostTransform):
    """Lead each link to a known paper to its bibliography entry."""

    default_priority = 200

    def run(self, **kwargs) -> None:
        if self.env.docname == PAGE:
            return
        bibfile = Path(self.app.srcdir, self.config.bibtex_bibfiles[0])
        known = references(str(bibfile), bibfile.stat().st_mtime)
        ids = {c.key: c.citation_id for c in self.env.get_domain("cite").citations}
        for node in list(self.document.findall(nodes.reference)):
            uri = node.get("refuri", "")
            match = ARXIV.match(uri)
            key, title = known.get(f"arxiv:{match[1]}" if match else uri.rstrip("/"), (None, None))
            if key in ids:
                node["refuri"] = f"{self.app.builder.get_relative_uri(self.env.docname, PAGE)}#{ids[key]}"
                node["internal"], node["reftitle"] = True, title
                node["classes"].append("citation-link")
            elif match:
                logger.warning(
                    "arXiv:%s is cited but not in %s", match[1], bibfile.name, location=node, type="citation"
                )


def plain_roles(app, pagename, templatename, context, doctree) -> None:
    """Roles that ARIA 1.2 deprecates, or that don't fit together, which docutils writes around the entries."""
    if pagename == PAGE:
        context["body"] = re.sub(r' role="(?:doc-biblioentry|list)"', "", context["body"])


def setup(app):
    app.add_post_transform(LinkCitations)
    app.connect("html-page-context", plain_roles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
