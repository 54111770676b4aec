"""How the pages look and what they weigh: colours, fonts and MathJax come in at build time, images when needed."""

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

from docutils import nodes
from fontTools import subset
from fontTools.ttLib import TTFont
from sphinx.transforms import SphinxTransform

BOXES = {
    "predict": "Predict first",
    "objectives": "What you will be able to do",
    "prerequisites": "What you need",
    "symbols": "Symbols of this chapter",
    "takeaway": "Takeaway",
    "misconception": "Misconception",
    "exercise": "Exercise",
    "fullsize": "Full size",
}
FACES = {"Regular": "400 normal", "It": "400 italic", "Semibold": "600 normal"}
CHARACTERS = (  # Latin, Greek, punctuation, raised and lowered figures, arrows, mathematical operators
    (0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x3FF), (0x2010, 0x2033), (0x2070, 0x209F), (0x20AC, 0x20AC), (0x2190, 0x2195),
    (0x2200, 0x226F), (0x1D62, 0x1D65),
)  # fmt: skip
BOX = re.compile(r'<div class="box (\w+)')
SVG_SIZE = re.compile(r'<svg[^>]*?\bviewBox="[\d.-]+ [\d.-]+ ([\d.]+) ([\d.]+)"', re.S)
IMAGE = re.compile(r'<img ([^>]*?)src="([^"]*_images/[^"]+)"')


def packaged(distribution: str, folder: str) -> Path:
    """A folder of files that a package brings; `importlib.resources` can't name it when its name has a hyphen."""
    return Path(importlib.metadata.distribution(distribution).locate_file(folder))


def palette(app) -> dict[str, str]:
    return json.loads(Path(app.srcdir, "llmlib", "palette.json").read_text())


def write_palette(app, static: Path) -> None:
    """The book's colours as CSS variables, so that palette.json is the only place they are written."""
    colours = palette(app)
    lines = [f"  --book-{name}: {value};" for name, value in colours.items()]
    (static / "palette.css").write_text("\n".join([":root {", *lines, "}", ""]))


def write_fonts(static: Path) -> None:
    """Latin subsets of Source Serif (Open Font Licence, which asks that a changed font has another name)."""
    source = packaged("font-source-serif-pro", "font_source_serif_pro/files")
    folder = static / "fonts"
    folder.mkdir(parents=True, exist_ok=True)
    rules = []
    for face, style in FACES.items():
        target = folder / f"book-serif-{face.lower()}.woff"
        if not target.exists():
            write_subset(source / f"SourceSerifPro-{face}.ttf", target)
        weight, slope = style.split()
        rules.append(
            f'@font-face {{ font-family: "Book Serif"; font-weight: {weight}; font-style: {slope}; font-display: swap; '
            f'src: url("fonts/{target.name}") format("woff"); }}'
        )
    shutil.copy(source / "LICENSE.txt", folder)
    (static / "fonts.css").write_text("\n".join(rules) + "\n")


def write_subset(source: Path, target: Path) -> None:
    options = subset.Options(
        flavor="woff", layout_features=["kern", "liga", "calt", "ccmp", "locl", "mark", "onum", "lnum"]
    )
    font = TTFont(source)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[c for first, last in CHARACTERS for c in range(first, last + 1)])
    subsetter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 3, 4, 6, 16):
            record.string = "BookSerif"
    font.flavor = "woff"
    font.save(target)


def bring(app, exception=None) -> None:
    """Copy MathJax, with the TeX extensions that it loads on demand, and write fonts and colours."""
    static = Path(app.outdir, "_static")
    static.mkdir(parents=True, exist_ok=True)
    write_palette(app, static)
    write_fonts(static)
    source, target = (
        packaged("sphinx-mathjax-offline", "sphinx-mathjax-offline/static/mathjax"),
        static / "vendor/mathjax",
    )
    for part in ("tex-chtml.js", "input/tex/extensions", "output/chtml"):
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / part, target / part)


class LabelBoxes(SphinxTransform):
    """`<div class="box predict">` gets its kind's name as a label where the author wrote none in bold."""

    default_priority = 300

    def apply(self, **kwargs) -> None:
        for raw in list(self.document.findall(nodes.raw)):
            match = BOX.search(raw.astext())
            if match and match[1] in BOXES and not self.labelled(raw):
                label = nodes.paragraph("", "", nodes.strong(text=BOXES[match[1]]), classes=["box-label"])
                raw.parent.insert(raw.parent.index(raw) + 1, label)

    def labelled(self, raw: nodes.raw) -> bool:
        position = raw.parent.index(raw) + 1
        after = raw.parent[position] if position < len(raw.parent) else None
        words = [child for child in after or () if child.astext()]
        return isinstance(after, nodes.paragraph) and bool(words) and isinstance(words[0], nodes.strong)


class NameSolutions(SphinxTransform):
    """A folded cell tagged `solution` says so."""

    default_priority = 10

    def apply(self, **kwargs) -> None:
        for cell in self.document.findall(nodes.container):
            if "tag_solution" in cell.get("classes", []):
                cell["prompt_show"], cell["prompt_hide"] = "Solution", "Hide the solution"


def lighten(app, pagename, templatename, context, doctree) -> None:
    """Images below the first are loaded when they come near, and keep their place on the page until then."""
    seen = 0

    def attributes(match: re.Match) -> str:
        nonlocal seen
        seen += 1
        extra = 'loading="lazy" decoding="async" ' if seen > 1 else ""
        file = Path(app.outdir, "_images", match[2].rsplit("/", 1)[-1])
        if file.suffix == ".svg" and "width=" not in match[0]:
            extra += svg_size(app, file)
        return f'<img {extra}{match[1]}src="{match[2]}"'

    if "body" in context:
        context["body"] = IMAGE.sub(attributes, context["body"])


def svg_size(app, file: Path) -> str:
    source = next((Path(s) for s, (_, name) in app.env.images.items() if name == file.name), None)
    path = Path(app.srcdir, source) if source else file
    size = SVG_SIZE.search(path.read_text(errors="ignore")[:2000]) if path.exists() else None
    return f'width="{float(size[1]) * 4 / 3:.0f}" height="{float(size[2]) * 4 / 3:.0f}" ' if size else ""


def setup(app):
    app.add_css_file("palette.css", priority=700)
    app.add_css_file("fonts.css", priority=700)
    app.add_transform(LabelBoxes)
    app.add_transform(NameSolutions)
    app.connect("builder-inited", bring)
    app.connect("html-page-context", lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
