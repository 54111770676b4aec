"""Publish the pages of `book/` without the folder: book/index.md is index.html, book/glossary.md is glossary.html."""

from pathlib import Path, PurePosixPath

from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.search import js_index

FOLDER = "book/"


class SearchFormat:
    """Sphinx's search index with the published page names; the sources' names come back from its list of files."""

    def dump(self, data, file) -> None:
        js_index.dump(data | {"docnames": [name.removeprefix(FOLDER) for name in data["docnames"]]}, file)

    def load(self, file):
        data = js_index.load(file)
        return data | {"docnames": [str(PurePosixPath(name).with_suffix("")) for name in data["filenames"]]}


class BookBuilder(StandaloneHTMLBuilder):
    """Sphinx's HTML builder; pages under `book/` are published one level up."""

    name = "html"
    indexer_format = SearchFormat()

    def get_target_uri(self, docname: str, typ: str | None = None) -> str:
        return super().get_target_uri(docname.removeprefix(FOLDER), typ)

    def finish(self) -> None:
        """Pages that an earlier build left, and that no source makes any more, are removed."""
        super().finish()
        made = {Path(self.get_outfilename(name)) for name in (*self.env.found_docs, "search")}
        for page in Path(self.outdir).rglob("*.html"):
            if page not in made and "_static" not in page.parts:
                page.unlink()

    def get_outfilename(self, pagename: str) -> str:
        return super().get_outfilename(pagename.removeprefix(FOLDER))


def setup(app):
    app.add_builder(BookBuilder, override=True)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
