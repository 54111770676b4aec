"""Tables, small tensors and source code, as text that follows the page's theme."""

import ast
import html
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from llmlib.notebook.figures import colours


class _Rendered:
    """One result in several forms; the front end takes the richest that it knows."""

    def __init__(self, **forms: str):
        self.forms = {{"html": "text/html", "markdown": "text/markdown", "text": "text/plain"}[k]: v
                      for k, v in forms.items()}  # fmt: skip

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return self.forms


def _display(**forms: str) -> None:
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(forms["text"])
        return
    if get_ipython() is None:
        print(forms["text"])
    else:
        display(_Rendered(**forms))


def table(rows: Sequence[Mapping | Sequence], columns: Sequence[str] | None = None, *, caption: str = "") -> None:
    """Display rows (mappings, or sequences under `columns`) as a table; numbers are set to the right."""
    rows = list(rows)
    if columns is None:
        columns = list(rows[0])
    cells = [[row[c] for c in columns] if isinstance(row, Mapping) else list(row) for row in rows]
    texts = [[_text(value) for value in row] for row in cells]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    _display(html=_html_table(texts, list(columns), right, caption), text=_text_table(texts, list(columns), caption))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value) and abs(value) >= 10_000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _html_table(texts, columns, right, caption) -> str:
    def cell(tag: str, value: str, to_right: bool) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return f'<{tag}{scope} style="text-align:{"right" if to_right else "left"}">{html.escape(value)}</{tag}>'

    head = "".join(cell("th", c, r) for c, r in zip(columns, right, strict=True))
    body = "\n".join("<tr>" + "".join(cell("td", v, r) for v, r in zip(row, right, strict=True)) + "</tr>"
                     for row in texts)  # fmt: skip
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (f'<div style="overflow-x:auto"><table class="llmlib-table">{title}\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>")  # fmt: skip


def _text_table(texts, columns, caption) -> str:
    widths = [max(len(row[i]) for row in [columns, *texts]) for i in range(len(columns))]
    rule = ["─" * w for w in widths]
    aligned = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip()
               for row in [columns, rule, *texts]]  # fmt: skip
    return "\n".join([*aligned, *([caption] if caption else [])])


def model_table(columns: Mapping[str, Callable], where: Callable = bool, *, caption: str = "") -> None:
    """ "Which models use it": one row per published model in `llmlib.presets`, one column per function of its config.

    columns  heading → function of the ModelConfig
    where    keeps the presets for which it is true
    """
    from llmlib import presets

    models = {name: presets.get(name) for name in presets.names() if where(presets.get(name))}
    rows = [{"model": name} | {title: read(config) for title, read in columns.items()}
            for name, config in models.items()]  # fmt: skip
    table(rows, caption=caption)


def matrix(
    values: Tensor, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None, *, digits: int = 2,
    caption: str = "",
) -> None:  # fmt: skip
    """Display a small matrix as its numbers, each shaded by its size (blue above zero, orange below)."""
    values = values.detach()
    limit = float(values[values.isfinite()].abs().double().max()) or 1.0
    texts = [[_number(v, digits) for v in row] for row in values.tolist()]
    rows = list(rows) if rows is not None else [str(i) for i in range(len(texts))]
    columns = list(columns) if columns is not None else [str(i) for i in range(values.shape[1])]
    head = "".join(f'<th scope="col" style="text-align:right">{html.escape(c)}</th>' for c in ["", *columns])
    head = head.replace('<th scope="col" style="text-align:right"></th>', "<td></td>", 1)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f'<td style="text-align:right;background:{_shade(v, limit)}">{t}</td>'
                  for v, t in zip(numbers, row, strict=True)) + "</tr>"
        for name, numbers, row in zip(rows, values.tolist(), texts, strict=True)
    )  # fmt: skip
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    plain = _text_table([[n, *row] for n, row in zip(rows, texts, strict=True)], ["", *columns], caption)
    markup = (f'<div style="overflow-x:auto"><table class="llmlib-matrix">{title}\n<thead><tr>{head}</tr></thead>\n'
              f"<tbody>\n{body}\n</tbody></table></div>")  # fmt: skip
    _display(html=markup, text=plain)


def _number(value, digits: int) -> str:
    if isinstance(value, bool | int):
        return str(int(value))
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def _shade(value, limit: float) -> str:
    """At most 45 % of a colour, over which the theme's own text colour keeps its contrast in light and in dark."""
    if value != value or abs(value) == float("inf") or value == 0:
        return "transparent"
    colour = colours()["blue" if value > 0 else "orange"]
    return f"{colour}{round(0.45 * 255 * abs(value) / limit):02x}"


def show(thing, *, docstring: bool = False) -> None:
    """Display the source of a function, class, method or op; of its docstring the first line, unless asked for all."""
    thing = inspect.unwrap(getattr(thing, "reference", thing))
    source = textwrap.dedent(inspect.getsource(thing)).rstrip()
    source = source if docstring else _with_short_docstrings(source)
    where = f"{inspect.getmodule(thing).__name__}"
    _display(markdown=f"```python\n# {where}\n{source}\n```", text=f"# {where}\n{source}")


def _with_short_docstrings(source: str) -> str:
    rows = source.splitlines()
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    for node in sorted(nodes, key=lambda n: -n.lineno):
        text, first = ast.get_docstring(node), node.body[0]
        if text and first.end_lineno > first.lineno:
            indent = " " * first.col_offset
            rows[first.lineno - 1 : first.end_lineno] = [f'{indent}"""{text.splitlines()[0]}"""']
    return "\n".join(rows)
