"""Block diagrams and differences, drawn from a `ModelConfig` as SVG and readable on a light or a dark page."""

import dataclasses
import html
import importlib.resources
import inspect
import json
from dataclasses import dataclass

from llmlib.model import Layer, ModelConfig, Spec

PALETTE = json.loads(importlib.resources.files("llmlib").joinpath("palette.json").read_text())
_COLOURS = {"attention": "blue", "ssm": "green", "ffn": "orange", "moe": "violet", "hybrid": "pink"}
_STEM, _NORM, _PART, _RIGHT = 40, 74, 150, 430
_LINE = 15


@dataclass
class Drawing:
    """An SVG picture: shown by notebooks, `str()` gives its text, `save(path)` writes it."""

    svg: str

    def __str__(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return f'<div class="diagram">{self.svg}</div>'

    def save(self, path) -> None:
        """Write the picture to a file; raises OSError where that can't be."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.svg)


def diagram(config: ModelConfig) -> Drawing:
    """The flow through a model: embedding, each run of equal layers once with its count, norm and head.

    Blue is attention, green a state space, orange a feed-forward, violet experts, pink mixers side by side.
    """
    canvas = _Canvas()
    canvas.box("embedding", [f"{config.vocab_size:,} × {config.d_model:,}"], "grey", _STEM - 24, 250)
    if config.position is not None:
        canvas.box(_name(config.position), _options(config.position), "grey", _STEM - 24, 250)
    if config.embedding_norm is not None:
        canvas.box(_name(config.embedding_norm), [], "grey", _STEM - 24, 250)
    if config.residual is not None:
        canvas.box(_name(config.residual), _options(config.residual), "grey", _STEM - 24, 250)
    for pattern, count in runs(config.layers):
        with canvas.group(f"× {count}" if count > 1 else ""):
            for layer in pattern:
                _draw_layer(canvas, layer, _name(layer.norm or config.norm))
    if config.final_norm:
        canvas.box(_name(config.norm), [], "grey", _STEM - 24, 250)
    tied = "tied to the embedding" if config.tie_embeddings else f"{config.d_model:,} × {config.vocab_size:,}"
    canvas.box("head", [tied], "grey", _STEM - 24, 250)
    return canvas.drawing(config.name or "model")


def outline(config: ModelConfig) -> list[str]:
    """The same flow as lines of text."""
    lines = [f"embedding  {config.vocab_size:,} × {config.d_model:,}"]
    lines += [_line_of(part) for part in (config.position, config.embedding_norm, config.residual) if part is not None]
    for pattern, count in runs(config.layers):
        lines.append(f"{count} ×" if len(pattern) == 1 else f"{count} × these {len(pattern)} layers")
        for layer in pattern:
            how = "parallel" if layer.parallel else f"{layer.placement}-norm"
            parts = [_line_of(part) for _, part in _parts(layer)]
            lines += [f"    {'+' if i else '·'} {part}{'' if i else f'  [{how}]'}" for i, part in enumerate(parts)]
    lines += [_name(config.norm)] if config.final_norm else []
    return [*lines, "head, tied to the embedding" if config.tie_embeddings else "head"]


def _line_of(spec: Spec) -> str:
    options = " · ".join(_options(spec))
    return f"{_name(spec)}{f'  {options}' if options else ''}"


def runs(layers: tuple[Layer, ...]) -> list[tuple[tuple[Layer, ...], int]]:
    """The layers as repeated patterns: (a, a, b, a, a, b) is one pattern (a, a, b) that stands twice.

    From each place it takes the pattern that covers most layers, and of those the shortest.
    """
    found, i = [], 0
    while i < len(layers):
        best = (1, 1)
        for size in range(1, (len(layers) - i) // 2 + 1):
            count = 1
            while layers[i + count * size : i + (count + 1) * size] == layers[i : i + size]:
                count += 1
            if count > 1 and size * count > best[0] * best[1]:
                best = (size, count)
        found.append((layers[i : i + best[0]], best[1]))
        i += best[0] * best[1]
    return [(p, c) for pattern, count in found for p, c in _split(pattern, count)]


def _split(pattern, count):
    """A pattern that stands once is its own runs of equal layers."""
    if count > 1 or len(pattern) == 1:
        return [(pattern, count)]
    return runs(pattern)


def _draw_layer(canvas: "_Canvas", layer: Layer, norm: str) -> None:
    if layer.parallel:
        canvas.branch([(norm if layer.parallel_norms == 2 or i == 0 else None, part) for i, part in _parts(layer)])
        return
    for _, part in _parts(layer):
        before = norm if layer.placement in ("pre", "sandwich") else None
        after = norm if layer.placement in ("inside", "sandwich") else None
        canvas.branch([(before, part)], after=after, on_stem=norm if layer.placement == "post" else None)


def _parts(layer: Layer):
    return list(enumerate(part for part in (layer.mixer, layer.cross, layer.ffn) if part is not None))


def _name(spec: Spec) -> str:
    return spec.cls.__name__


def _options(spec: Spec) -> list[str]:
    """The options that aren't left at their defaults, as short lines, as many to a line as fit."""
    words, known = [], inspect.signature(spec.cls).parameters
    for key, value in spec.options.items():
        if value is None or (key in known and value is known[key].default):
            continue
        name, text = key.replace("_", " "), _short(value)
        word = name if value is True else f"{name} {text}"
        if words and len(words[-1]) + len(word) <= 38:
            words[-1] += f" · {word}"
        else:
            words.append(word[:44])
    return words


def _short(value) -> str:
    if isinstance(value, Spec):
        return _name(value)
    if isinstance(value, dict):
        return str(value.get("type", "…"))
    if isinstance(value, tuple):
        return ", ".join(map(_short, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"


def _colour(spec: Spec) -> str:
    return _COLOURS.get(spec.cls.__module__.split(".")[1], "grey")


class _Canvas:
    """Draws downwards along one stem, the residual stream."""

    def __init__(self):
        self.parts, self.y, self.label, self._group_top = [], 10.0, "", 0.0
        self.covered: list[tuple[float, float]] = []  # where something stands on the stem

    def drawing(self, title: str) -> Drawing:
        height, width = self.y + 6, _RIGHT + 70
        title = html.escape(title)
        ends = [end for span in self.covered for end in span][1:-1]
        stem = "".join(
            _line(_STEM, top, _STEM, bottom, opacity=0.5) for top, bottom in zip(ends[::2], ends[1::2], strict=True)
        )
        return Drawing(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" role="img" '
            f'aria-label="Block diagram of {title}" style="max-width:100%;height:auto;color:inherit" '
            f'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">'
            f"<title>Block diagram of {title}</title>{stem}{''.join(self.parts)}</svg>"
        )

    def box(self, title: str, lines: list[str], colour: str, x: float, right: float) -> float:
        """A labelled box at the current height; returns how tall it is."""
        height = 22 + _LINE * len(lines)
        self.parts.append(_box(title, lines, colour, x, self.y, right - x, height))
        self.covered.append((self.y, self.y + height))
        self.y += height + 14
        return height

    def branch(
        self, parts: list[tuple[str | None, Spec]], after: str | None = None, on_stem: str | None = None
    ) -> None:
        """Leave the stem, pass norm and part, and come back to it at a ⊕."""
        tap = self.y
        for norm, part in parts:
            lines = _options(part)
            height = 22 + _LINE * len(lines)
            middle = self.y + height / 2
            self.parts.append(_line(_STEM, tap, _STEM + 14, tap) + _line(_STEM + 14, tap, _STEM + 14, middle))
            if norm is None:
                self.parts.append(_line(_STEM + 14, middle, _PART, middle, arrow=True))
            else:
                self.parts.append(_line(_STEM + 14, middle, _NORM - 8, middle))
                self.parts.append(_line(_NORM + 66, middle, _PART, middle, arrow=True))
                self.parts.append(_box(norm, [], "grey", _NORM - 8, middle - 10, 74, 20, size=11))
            self.parts.append(_box(_name(part), lines, _colour(part), _PART, self.y, _RIGHT - _PART, height))
            self.parts.append(_line(_RIGHT, middle, _RIGHT + 12, middle))
            top, self.y = middle, self.y + height + 8
        back = self.y + 8
        left = _STEM + 9
        self.parts.append(_line(_RIGHT + 12, top, _RIGHT + 12, back))
        if after is None:
            self.parts.append(_line(_RIGHT + 12, back, left, back, True))
        else:
            self.parts.append(_line(_RIGHT + 12, back, _PART + 134, back) + _line(_PART + 60, back, left, back, True))
        if len(parts) > 1:
            first = tap + (22 + _LINE * len(_options(parts[0][1]))) / 2
            self.parts.append(_line(_RIGHT + 12, first, _RIGHT + 12, top))
        if after is not None:
            self.parts.append(_box(after, [], "grey", _PART + 60, back - 10, 74, 20, size=11))
        self.parts.append(_plus(_STEM, back))
        self.covered.append((back - 8, back + 8))
        self.y = back + 24
        if on_stem is not None:
            self.parts.append(_box(on_stem, [], "grey", _STEM - 30, self.y - 10, 74, 20, size=11))
            self.covered.append((self.y - 10, self.y + 10))
            self.y += 26

    def group(self, label: str) -> "_Canvas":
        self.label, self._group_top = label, self.y
        self.y += 14
        return self

    def __enter__(self) -> "_Canvas":
        return self

    def __exit__(self, *_) -> None:
        height = self.y - self._group_top - 6
        self.parts.append(
            f'<rect x="8" y="{self._group_top:.1f}" width="{_RIGHT + 14}" height="{height:.1f}" rx="10" fill="none" '
            f'stroke="currentColor" stroke-opacity=".35" stroke-dasharray="4 4"/>'
            f'<text x="{_RIGHT + 30}" y="{self._group_top + height / 2 + 5:.1f}" font-size="15">{self.label}</text>'
        )
        self.y += 10


def _box(title, lines, colour, x, y, width, height, size=13) -> str:
    rows = "".join(
        f'<text x="{x + width / 2:.1f}" y="{y + 31 + _LINE * i:.1f}" text-anchor="middle" font-size="11" '
        f'opacity=".8">{html.escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    baseline = y + (height / 2 + size * 0.35 if not lines else 16)
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6" fill="{PALETTE[colour]}" '
        f'fill-opacity=".16" stroke="{PALETTE[colour]}"/><text x="{x + width / 2:.1f}" y="{baseline:.1f}" '
        f'text-anchor="middle" font-size="{size}">{html.escape(title)}</text>{rows}'
    )


def _line(x1, y1, x2, y2, arrow=False, opacity=0.6) -> str:
    line = (
        f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="currentColor" stroke-opacity="{opacity}" fill="none"/>'
    )
    step = 5 if x2 > x1 else -5
    head = f'<path d="M{x2 - step:.1f} {y2 - 4:.1f}L{x2:.1f} {y2:.1f}L{x2 - step:.1f} {y2 + 4:.1f}z" opacity=".7"/>'
    return line + (head if arrow else "")


def _plus(x, y) -> str:
    return (
        f'<circle cx="{x}" cy="{y:.1f}" r="8" fill="{PALETTE["grey"]}" fill-opacity=".25" stroke="currentColor" '
        f'stroke-opacity=".6"/><path d="M{x - 5} {y:.1f}h10M{x} {y - 5:.1f}v10" stroke="currentColor"/>'
    )


def difference(one: ModelConfig, other: ModelConfig) -> list[tuple[str, str, str]]:
    """Rows (what, in one, in the other) for everything that differs: fields of the config, options of each part.

    An option that one of them leaves out has its default there; layers are compared in pairs, from the first on.
    """
    rows = []
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("layers", "name"):
            rows += _compare(field.name, getattr(one, field.name), getattr(other, field.name))
    if len(one.layers) != len(other.layers):
        rows.append(("number of layers", str(len(one.layers)), str(len(other.layers))))
    if _pattern(one) != _pattern(other) and not (_is_uniform(one) and _is_uniform(other)):
        rows.append(("pattern of layers", _pattern(one), _pattern(other)))
    pairs = dict.fromkeys(zip(one.layers, other.layers, strict=False))
    for a, b in pairs:
        for field in dataclasses.fields(Layer):
            rows += _compare(field.name, getattr(a, field.name), getattr(b, field.name))
    return list(dict.fromkeys(rows))


def _is_uniform(config: ModelConfig) -> bool:
    return len(set(config.layers)) <= 1


def _pattern(config: ModelConfig) -> str:
    def show(layer):
        return " + ".join(_name(part) for _, part in _parts(layer))

    return ", ".join(f"{count} × ({' | '.join(map(show, pattern))})" for pattern, count in runs(config.layers))


def _compare(name: str, a, b) -> list[tuple[str, str, str]]:
    if a == b:
        return []
    if isinstance(a, Spec) and isinstance(b, Spec) and a.cls is b.cls:
        keys = dict.fromkeys([*a.options, *b.options])
        return [row for k in keys for row in _compare(f"{name}.{k}", _option(a, k), _option(b, k))]
    return [(name, _word(a), _word(b))]


def _option(spec: Spec, key: str):
    """The value of an option, given or by default."""
    parameter = inspect.signature(spec.cls).parameters.get(key)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return spec.options.get(key, default)


def _word(value) -> str:
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "—" if value is None else str(value)
    )


def difference_table(one: ModelConfig, other: ModelConfig) -> Drawing:
    """`difference` as an SVG table of three columns."""
    rows = [("", one.name or "one", other.name or "other"), *difference(one, other)]
    columns = [[str(row[i]) for row in rows] for i in range(3)]
    widths = [max(len(cell) for cell in column) * 7.2 + 24 for column in columns]
    lefts = [0, widths[0], widths[0] + widths[1]]
    cells = "".join(
        f'<text x="{left + 8:.1f}" y="{22 * i + 16}" font-weight="{600 if i == 0 or left == 0 else 400}">'
        f"{html.escape(cell)}</text>"
        for left, column in zip(lefts, columns, strict=True)
        for i, cell in enumerate(column)
    )
    rules = "".join(_line(0, 22 * i, sum(widths), 22 * i, opacity=0.25) for i in range(1, len(rows)))
    return Drawing(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {sum(widths):.0f} {22 * len(rows) + 4}" '
        f'width="{sum(widths):.0f}" role="img" aria-label="Differences between {html.escape(rows[0][1])} and '
        f'{html.escape(rows[0][2])}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor" '
        f'style="max-width:100%;height:auto;color:inherit">{rules}{cells}</svg>'
    )
