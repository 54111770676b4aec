"""Checkpoints whose weights are stored in 4 or 8 bits, seen as the weights that these stand for.

Two formats, in which models are published: MXFP4 (gpt-oss) and FP8 with a scale for each block (DeepSeek-V3). Only the
weights are taken from them; all sums are done in the dtype that the model is loaded in.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlib.errors import CheckpointError, UnsupportedArchitectureError
from llmlib.hf.checkpoint import Checkpoint

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_BLOCK_NUMBERS = 1 << 21  # how many weights are made at once


def mxfp4(blocks: Int[Tensor, "*b g 16"], scales: Int[Tensor, "*b g"]) -> Float[Tensor, "*b n"]:
    """FP4[code] · 2^(scale − 127), with two codes of four bits in each byte, the lower half first.

    blocks  uint8: 32 weights that share a scale; a code is a sign and one of the eight sizes in `FP4`
    scales  uint8: the exponent; 255 is NaN
    Exact in bfloat16, which it returns; n = 32 g. OCP Microscaling Formats (MX) Specification, version 1.0.
    """
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    values = torch.cat([FP4, -FP4])[codes.int()]
    exponents = torch.where(scales == 255, torch.nan, scales.float() - 127)
    return torch.mul(values, torch.exp2(exponents).unsqueeze(-1)).flatten(-2).bfloat16()


def scaled_blocks(
    weight: Float[Tensor, "o i"], scales: Float[Tensor, "bo bi"], block: tuple[int, int]
) -> Float[Tensor, "o i"]:
    """weight · the scale of its block of block[0] × block[1] weights, in float32. DeepSeek-V3, arXiv 2412.19437."""
    spread = scales.float().repeat_interleave(block[0], 0)[: weight.shape[0]].repeat_interleave(block[1], 1)
    return weight.float() * spread[:, : weight.shape[1]]


class Quantised:
    """A `Checkpoint` in which codes and their scales are one tensor, under the plain name. Its formats are below.

    codes, scales  how the names of the stored parts end, where the plain name ends with neither
    kinds          the types in the file that the codes may have, and those that the scales may have
    """

    codes: str
    scales: str
    kinds: tuple[tuple[str, ...], tuple[str, ...]]

    def __init__(self, source: Checkpoint):
        self.source, self.listing = source, source.listing
        ends = [end for end in (self.codes, self.scales) if end]
        plain = {name.removesuffix(end) for end in ends for name in source if name.endswith(end)}
        self.parts = {name: (name + self.codes, name + self.scales) for name in plain}
        for parts in self.parts.values():
            self._require_fitting(*parts)
        hidden = {part for parts in self.parts.values() for part in parts}
        self.files = {name: file for name, file in source.files.items() if name not in hidden}
        self.files |= {name: source.files[codes] for name, (codes, _) in self.parts.items()}

    def _require_fitting(self, codes: str, scales: str) -> None:
        for one, other in ((codes, scales), (scales, codes)):
            if one not in self.source:
                raise CheckpointError(f"{self.listing} holds {other!r} without {one!r}: download the checkpoint again")
        for one, other, kinds in zip((codes, scales), (scales, codes), self.kinds, strict=True):
            if (kind := self.source.kind(one)) not in kinds:
                raise CheckpointError(
                    f"{self.source.files[one]}: {one!r} is stored as {kind}, and beside {other!r} must be "
                    f"{' or '.join(kinds)}"
                )
        shape = self.source.shape(codes)
        found, wanted = self.source.shape(scales), self.scales_shape(shape)
        if found != wanted:
            raise CheckpointError(
                f"{self.source.files[scales]}: {scales!r} has shape {found}, and for {codes!r}, which has {shape}, "
                f"must have {wanted}"
            )

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the scales of codes of that shape; None where codes can't have it."""
        raise NotImplementedError

    def plain_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the weights that codes of that shape stand for."""
        raise NotImplementedError

    def plain(self, codes: str, scales: str, rows: slice) -> Tensor:
        """Those rows of the weights."""
        raise NotImplementedError

    def whole_blocks(self, rows: int) -> int:
        """So many rows, or somewhat more, that can be made apart from others."""
        return rows

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def require_floats(self, name: str) -> None:
        """CheckpointError when a tensor isn't stored as floating point, plain or in this format."""
        if name not in self.parts:
            self.source.require_floats(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        if name not in self.parts:
            return self.source.shape(name)
        return self.plain_shape(self.source.shape(self.parts[name][0]))

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        if name not in self.parts:
            return self.source.read(name)
        blocks = self.blocks(name)
        rows, first = next(blocks)
        whole = torch.empty(self.shape(name), dtype=first.dtype)
        whole[rows] = first
        for rows, block in blocks:
            whole[rows] = block
        return whole

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """A tensor piece by piece along its first axis: (which rows, those rows)."""
        if name not in self.parts:
            yield from self.source.blocks(name)
            return
        length, *others = self.shape(name)
        step = self.whole_blocks(max(1, _BLOCK_NUMBERS // max(1, torch.Size(others).numel())))
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            yield rows, self.plain(*self.parts[name], rows)

    def copy_(self, target: Tensor, name: str) -> None:
        """Copy a tensor into one of the same shape, block by block, converting it on the way."""
        if name not in self.parts:
            self.source.copy_(target, name)
            return
        for rows, block in self.blocks(name):
            target[rows].copy_(block)


class MXFP4(Quantised):
    """Experts' matrices of gpt-oss, (experts, outputs, groups, 16) bytes, as (experts, inputs, outputs)."""

    codes, scales, kinds = "_blocks", "_scales", (("U8",), ("U8",))

    def scales_shape(self, shape):
        return shape[:-1] if len(shape) == 4 and shape[-1] == 16 else None

    def plain_shape(self, shape):
        experts, outputs, groups, _ = shape
        return experts, 32 * groups, outputs

    def plain(self, codes, scales, rows):
        return mxfp4(self.source.rows(codes, rows), self.source.rows(scales, rows)).transpose(1, 2)


class BlockFP8(Quantised):
    """Matrices of 8 bits (e4m3), with a scale for each block of `block` = (rows, columns)."""

    codes, scales, kinds = "", "_scale_inv", (("F8_E4M3",), ("F32", "BF16"))

    def __init__(self, source: Checkpoint, block: tuple[int, int]):
        self.block = block
        super().__init__(source)

    def scales_shape(self, shape):
        return tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True)) if len(shape) == 2 else None

    def plain_shape(self, shape):
        return shape

    def plain(self, codes, scales, rows):
        in_blocks = slice(rows.start // self.block[0], -(-rows.stop // self.block[0]))
        return scaled_blocks(self.source.rows(codes, rows), self.source.rows(scales, in_blocks), self.block)

    def whole_blocks(self, rows):
        return -(-rows // self.block[0]) * self.block[0]


def dequantised(config: dict, file: Path, source: Checkpoint) -> Checkpoint | Quantised:
    """`source` as plain weights: itself, or by the format that config.json's quantization_config names."""
    make = reader_of(config, file)
    return source if make is None else make(source)


def reader_of(config: dict, file: Path) -> Callable[[Checkpoint], Quantised] | None:
    """What makes plain weights of a checkpoint with that config.json; None where they are plain already.

    Raises UnsupportedArchitectureError for a quantization_config of another format.
    """
    options = config.get("quantization_config")
    if not options:
        return None
    method = options.get("quant_method") if isinstance(options, dict) else options
    if method == "mxfp4":
        return MXFP4
    if (
        method == "fp8"
        and options.get("fmt", "e4m3") == "e4m3"
        and _is_block(block := options.get("weight_block_size"))
    ):
        return partial(BlockFP8, block=tuple(block))
    raise UnsupportedArchitectureError(
        f"{file}: quantization_config says that the weights are quantised ({method}), and llmlib reads only mxfp4, "
        f"fp8 (e4m3 with a weight_block_size of two numbers), and plain ones: look for an unquantised copy of the model"
    )


def _is_block(block) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
