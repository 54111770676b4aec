"""The front page: `{architectures}` draws the four architectures, `{start}` is the row of buttons to begin with."""

from book_numbers import number
from book_repository import colab, repository
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

EXPLORER = "book/scaling-explorer"
LAYERS = 6
WIDTH, ROW, BLOCK_HEIGHT, TOP = 212, 31, 24, 44
MIXERS = {"attention": "blue", "Mamba": "green"}
ARCHITECTURES = (
    ("Dense", ["attention"] * LAYERS, "MLP", "every token reads every token", "memory grows with the text"),
    ("Mamba", ["Mamba"] * LAYERS, None, "a state of fixed size", "memory stays constant"),
    (
        "Mixture of experts",
        ["attention"] * LAYERS,
        "experts",
        "each token picks its experts",
        "more weights, equal work",
    ),
    ("Hybrid", ["Mamba", "Mamba", "attention"] * 2, "MLP", "mostly state, some attention", "memory grows slowly"),
)


def block(x: float, y: float, width: float, hue: str, text: str = "") -> str:
    label = f'<text x="{x + width / 2}" y="{y + 16}" text-anchor="middle">{text}</text>' if text else ""
    return f'<g class="{hue}"><rect x="{x}" y="{y}" width="{width}" height="{BLOCK_HEIGHT}" rx="4"/>{label}</g>'


def experts(x: float, y: float, width: float, row: int) -> str:
    """Eight experts, of which a token takes two, other ones in each layer."""
    pitch = width / 8
    taken = {row * 3 % 8, (row * 3 + 2 + row % 3) % 8}
    squares = (
        f'<rect class="{"taken" if i in taken else ""}" x="{x + i * pitch + 1:.1f}" y="{y + 2}" '
        f'width="{pitch - 2.5:.1f}" height="{BLOCK_HEIGHT - 4}" rx="2"/>'
        for i in range(8)
    )
    return f'<g class="violet">{"".join(squares)}</g>'


def layer(y: float, mixer: str, ffn: str | None, row: int) -> str:
    if ffn is None:
        return block(18, y, 180, MIXERS[mixer], mixer)
    second = experts(112, y, 86, row) if ffn == "experts" else block(112, y, 86, "orange", ffn)
    return block(18, y, 86, MIXERS[mixer], mixer) + second


def drawing(title: str, mixers: list[str], ffn: str | None, idea: str, memory: str) -> str:
    bottom = TOP + LAYERS * ROW
    layers = "".join(layer(TOP + row * ROW + 3, mixer, ffn, row) for row, mixer in enumerate(mixers))
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + 58}" role="img" aria-label="{title}: {idea}; {memory}.">'
        f'<text class="title" x="0" y="22">{title}</text>'
        f'<path class="stream" d="M4 {bottom + 6} V{TOP - 6} m-4 5 l4 -5 l4 5"/>{layers}'
        f'<text class="idea" x="0" y="{bottom + 32}">{idea}</text>'
        f'<text class="memory" x="0" y="{bottom + 51}">{memory}</text></svg>'
    )


class Architectures(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        drawings = "".join(drawing(*architecture) for architecture in ARCHITECTURES)
        return [nodes.raw("", f'<div class="architectures">{drawings}</div>', format="html")]


class start_row(nodes.General, nodes.Element):  # noqa: N801 (docutils names nodes so)
    """Filled when it is known which pages there are."""


class Start(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        return [start_row()]


def fill(app, doctree, docname) -> None:
    for node in list(doctree.findall(start_row)):
        chapters = sorted(name for name in app.env.found_docs if number(name) is not None)
        pages = [("Start reading", chapters[0])] if chapters else [("Read the notation", "book/notation")]
        if EXPLORER in app.env.found_docs:
            pages.append(("Open the scaling explorer", EXPLORER))
        links = [(text, app.builder.get_relative_uri(docname, page)) for text, page in pages]
        if chapters and colab(chapters[0]):
            links.append(("Run it on Colab", colab(chapters[0])))
        if repository():
            links.append(("Repository", repository()))
        anchors = "".join(f'<a href="{address}">{text}</a>' for text, address in links)
        node.replace_self(nodes.raw("", f'<div class="start">{anchors}</div>', format="html"))


def setup(app):
    app.add_directive("architectures", Architectures)
    app.add_directive("start", Start)
    app.add_node(start_row)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
