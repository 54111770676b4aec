"""Interactive figures: one dependency-free JavaScript view per figure, still on a page or live in a notebook.

A view is `<name>.js` in this folder, an ES module in anywidget's form (`export default { render({ model, el }) {…} }`).
It draws with the toolkit of `common.js` (read its head first) and keeps its whole state in `model`.

    embed("attention", {"temperature": 1.0})     # in the page itself: no kernel, no network
    widget("attention", temperature=1.0)         # an ipywidgets widget: observe, link, jslink
"""

import json
import re
from functools import cache
from html import escape
from pathlib import Path

from llmlib.errors import ConfigError, require

FOLDER = Path(__file__).parent
_MODULE = re.compile(r'(<script type="module">)/\* lm:(\w+) \*/.*?(</script>)', re.DOTALL)


def views() -> list[str]:
    """Names of the views that can be shown."""
    return sorted(path.stem for path in FOLDER.glob("*.js") if path.stem != "common")


@cache
def source(name: str) -> str:
    """The ES module of view `name`: palette, toolkit and view in one text (what anywidget loads).

    Raises ConfigError for a name without a `.js` file.
    """
    require(name in views(), f"no interactive is called {name!r}: there are {', '.join(views())}")
    palette = json.dumps(json.loads((FOLDER.parent / "palette.json").read_text()))
    parts = (FOLDER / "common.js", FOLDER / f"{name}.js")
    return f"const PALETTE = {palette};\n" + "\n".join(part.read_text(encoding="utf-8") for part in parts)


def _module(name: str) -> str:
    """The inline script: it can't export, so the view becomes a constant that the toolkit mounts."""
    view, exports = re.subn(r"^export default", "const VIEW =", source(name), flags=re.MULTILINE)
    require(exports == 1, f"{name}.js must have one line that starts with 'export default', but has {exports}")
    script = view + f'lm.mount("{name}", VIEW);\n'
    require("</script" not in script, f"{name}.js or common.js contains '</script': split the string")
    return f"/* lm:{name} */\n{script}"


def _plain(value):
    """Arrays and tensors as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ConfigError(f"an interactive's data must be JSON, arrays or tensors, but got a {type(value).__name__}")


class Embedded:
    """An interactive as HTML; a notebook shows it by `_repr_html_`."""

    def __init__(self, name: str, data: dict, height: int, title: str):
        self.name, self.data, self.height, self.title = name, data, height, title

    def _repr_html_(self) -> str:
        try:
            state = json.dumps(self.data, default=_plain, allow_nan=False, separators=(",", ":"))
        except ValueError as error:
            raise ConfigError(f"the data of interactive {self.name!r} can't be written as JSON: {error}") from error
        state = state.replace("</", "<\\/")
        return (
            f'<div class="lm-interactive" data-lm="{self.name}" style="min-height:{self.height}px">'
            f"<p><em>{escape(self.title)}: an interactive figure. If you see only this text, "
            "run this cell, or open the page in a browser with JavaScript.</em></p>"
            f'<script type="application/json">{state}</script></div>\n'
            f'<script type="module">{_module(self.name)}</script>'
        )

    def __repr__(self) -> str:
        return f"embed({self.name!r})"

    def page(self) -> str:
        """A complete HTML document around the interactive, to save and send."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title></head><body><main>{self._repr_html_()}</main></body></html>"
        )


def embed(name: str, data: dict | None = None, *, height: int = 320, title: str | None = None) -> Embedded:
    """View `name` inlined in the output with its `data`: works with no kernel and no network.

    Each key of `data` is a key of the view's model; arrays and tensors become lists. `height` is the room (in pixels)
    kept free while the page loads. The HTML is the same on every run, so a notebook that shows it can be compared.
    Raises ConfigError for an unknown view or data that JSON can't hold.
    """
    source(name)
    return Embedded(name, dict(data or {}), height, title or name.replace("_", " ").capitalize())


def widget(name: str, **traits):
    """View `name` as a live ipywidgets widget: each keyword is a synchronised trait for `observe`, `link` and `jslink`.

    A number becomes a Float trait, text Unicode, True or False Bool, anything else Any (assign a new value to change).
    """
    import traitlets
    from anywidget import AnyWidget

    def trait(value):
        kinds = ((bool, traitlets.Bool), (int | float, traitlets.Float), (str, traitlets.Unicode))
        kind = next((kind for python, kind in kinds if isinstance(value, python)), traitlets.Any)
        return kind(_plain(value) if hasattr(value, "tolist") else value).tag(sync=True)

    members = {key: trait(value) for key, value in traits.items()}
    title = "".join(part.capitalize() for part in name.split("_"))
    return type(title, (AnyWidget,), {"_esm": source(name), **members})()


def refresh(notebook: Path) -> bool:
    """Replace the scripts inlined in a notebook's outputs by today's; True when the file changed.

    The data stays as the notebook computed it: run the notebook again where that changed too.
    """

    def today(match: re.Match) -> str:
        return match[1] + _module(match[2]) + match[3]

    content = json.loads(notebook.read_text(encoding="utf-8"))
    changed = False
    for cell in content["cells"]:
        for output in cell.get("outputs", []):
            html = output.get("data", {}).get("text/html")
            if html is None:
                continue
            old = "".join(html)
            new = _MODULE.sub(today, old)
            if new != old:
                output["data"]["text/html"] = new.splitlines(keepends=True)
                changed = True
    if changed:
        notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return changed
