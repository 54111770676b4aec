"""Rename tables: from llmlib's names to a family's, as strings.

A row is `"layers.{i}.mixer.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight"`. Letters in braces stand for
numbers: the layer {i}, the expert {e} (whose tensors are stacked along a first axis). After a `|` come the steps that
turn what is stored into what llmlib holds:

    T              the transpose (GPT-2's Conv1D stores inputs × outputs)
    T12            the transpose of each expert's matrix
    stacked q      the query rows of a matrix with all queries, then all keys, then all values; likewise k, v
    grouped q      … of a matrix with, for each key/value head, its queries, its key and its value; likewise k, v
    part 0/2       the first of two equal parts along the rows; on a stack of experts `part1 0/2`, each expert's
    step 0/2       every second row, from the first; on a stack of experts `step1 0/2`
"""

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llmlib.errors import CheckpointError
from llmlib.hf.checkpoint import Checkpoint


def rows(ours: str, theirs: str, **pairs: str) -> dict[str, str]:
    """Table rows that share their beginnings: rows("a.", "b.", x="y") is {"a.x": "b.y"}; __ stands for a dot."""
    return {ours + left.replace("__", "."): theirs + right for left, right in pairs.items()}


def norm(ours: str, theirs: str) -> dict[str, str]:
    """The gain and the bias of a norm."""
    return {f"{ours}.weight": f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}


linear = norm


def _fraction(x: Tensor, text: str, axis: int) -> Tensor:
    which, of = map(int, text.split("/"))
    return x.chunk(of, axis)[which]


def _step(x: Tensor, text: str, axis: int) -> Tensor:
    which, of = map(int, text.split("/"))
    return x.movedim(axis, 0)[which::of].movedim(0, axis)


def _stacked(x: Tensor, which: str, owner: nn.Module) -> Tensor:
    q, kv = owner.num_heads * owner.head_dim, owner.num_kv_heads * owner.head_dim
    return x.split([q, kv, kv])["qkv".index(which)]


def _grouped(x: Tensor, which: str, owner: nn.Module) -> Tensor:
    g, width = owner.num_kv_heads, owner.head_dim
    groups = x.view(g, owner.num_heads // g + 2, width, *x.shape[1:])
    part = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}[which]
    return part.reshape(-1, *x.shape[1:])


STEPS: dict[str, Callable[[Tensor, str, nn.Module], Tensor]] = {
    "T": lambda x, _, __: x.T,
    "T12": lambda x, _, __: x.transpose(1, 2),
    "stacked": _stacked,
    "grouped": _grouped,
    "part": lambda x, text, _: _fraction(x, text, 0),
    "part1": lambda x, text, _: _fraction(x, text, 1),
    "step": lambda x, text, _: _step(x, text, 0),
    "step1": lambda x, text, _: _step(x, text, 1),
}


def place(name: str) -> tuple[str, int | None]:
    """A parameter's row and layer: "layers.3.ffn.x" belongs to the row "layers.{i}.ffn.x", and i is 3."""
    found = re.match(r"layers\.(\d+)\.(.*)", name)
    return (f"layers.{{i}}.{found[2]}", int(found[1])) if found else (name, None)


def fill(target: Tensor, row: str, i: int | None, owner: nn.Module, source: Checkpoint, ours: str) -> Iterator[str]:
    """Copy what `row` names into `target`; yields the names of the tensors that it used."""
    name, *steps = (part.strip() for part in row.split("|"))
    name = name.replace("{i}", str(i))
    if "{e}" in name:
        for e in range(target.shape[0]):
            yield from fill(target[e], " | ".join([name.replace("{e}", str(e)), *steps]), i, owner, source, ours)
        return
    if name not in source:
        raise CheckpointError(f"{source.listing} has no tensor {name!r}, which {ours} is made from")
    source.require_floats(name)
    if not steps:
        _require_shape(source.shape(name), target, name, ours, source)
        source.copy_(target, name)
    else:
        target.copy_(_apply(steps, target, name, owner, source, ours))
    yield name


def _apply(steps: list[str], target: Tensor, name: str, owner: nn.Module, source: Checkpoint, ours: str) -> Tensor:
    x = source.read(name)
    stored = tuple(x.shape)
    try:
        for step in steps:
            word, _, text = step.partition(" ")
            x = STEPS[word](x, text, owner)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{source.files[name]}: {name!r} has shape {stored}, from which {ours} {tuple(target.shape)} can't be cut "
            f"({error})"
        ) from None
    _require_shape(tuple(x.shape), target, name, ours, source, stored)
    return x if x.dtype == target.dtype else x.to(torch.promote_types(x.dtype, target.dtype))


def _require_shape(found, target: Tensor, name: str, ours: str, source: Checkpoint, stored=None) -> None:
    if found != tuple(target.shape):
        cut = "" if stored is None else f", of which its part is {found}"
        raise CheckpointError(
            f"{source.files[name]}: {name!r} has shape {stored or found}{cut}; the config asks for "
            f"{tuple(target.shape)} ({ours})"
        )
