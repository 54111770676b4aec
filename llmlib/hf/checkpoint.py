"""A checkpoint on disk: config.json beside safetensors, in one file or in shards with an index."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmlib.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_BLOCK_BYTES = 8 << 20  # what is read at once: reading a tensor whole would need room for it twice
_REOPEN_BYTES = 16 << 20  # pages of a mapped file stay resident while it is open
_FLOATS = {"F64", "F32", "F16", "BF16"}


class Checkpoint:
    """The tensors of a folder by name. Nothing is read before `copy_` asks for it; pickle files are never opened.

    listing  the file that says which tensors there are: the index of the shards, or the only file
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.listing, self.files = self._find()
        self._open, self._handle, self._read = None, None, 0

    def _find(self) -> tuple[Path, dict[str, Path]]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.exists():
            return index, self._indexed(index)
        others = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if len(others) == 1:
            return others[0], {name: others[0] for name in self._names(others[0])}
        pickles = [p.name for p in (*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth"))]
        remedy = (
            f"; {pickles[0]} holds pickled weights, which can run any code and are never opened: convert them to "
            f"safetensors" if pickles else ""
        )  # fmt: skip
        raise CheckpointError(f"{self.folder} has no {SINGLE} and no {INDEX}{remedy}")

    def _indexed(self, index: Path) -> dict[str, Path]:
        places = _places(index)
        for shard in shards(index):
            if not (self.folder / shard).exists():
                raise CheckpointError(f"{index} names the shard {shard}, and {self.folder} has no such file")
            wanted, held = {n for n, s in places.items() if s == shard}, set(self._names(self.folder / shard))
            if wanted - held:
                raise CheckpointError(f"{index} says that {shard} holds {min(wanted - held)!r}, and it doesn't")
            if held - wanted:
                name = min(held - wanted)
                says = f"places in {places[name]}" if name in places else "doesn't name"
                raise CheckpointError(f"{shard} holds {name!r}, which {index} {says}")
        return {name: self.folder / shard for name, shard in places.items()}

    @staticmethod
    def _names(file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as handle:
                return list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file ({error}): download it again") from None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def _slice(self, name: str):
        file = self.files[name]
        if self._open != file or self._read > _REOPEN_BYTES:
            self._handle, self._open, self._read = safe_open(file, framework="pt"), file, 0
        return self._handle.get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The type that a tensor is stored in, in the format's own words: F32, F8_E4M3, …"""
        return self._slice(name).get_dtype()

    def require_floats(self, name: str) -> None:
        """CheckpointError when a tensor isn't plain floating point (quantised weights, say)."""
        if (kind := self.kind(name)) not in _FLOATS:
            raise CheckpointError(
                f"{self.files[name]}: {name!r} is stored as {kind}, and llmlib reads only "
                f"{', '.join(sorted(_FLOATS))}: use the unquantised checkpoint"
            )

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        part = self._slice(name)
        self._read += _bytes(part)
        return part[...] if part.get_shape() else self._handle.get_tensor(name)

    def copy_(self, target: Tensor, name: str) -> None:
        """Copy a tensor into one of the same shape, block by block, converting it on the way."""
        if not self.shape(name):
            target.copy_(self.read(name))
            return
        for rows, block in self.blocks(name):
            target[rows].copy_(block)

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """A tensor piece by piece along its first axis: (which rows, those rows)."""
        length = self.shape(name)[0]
        step = max(1, _BLOCK_BYTES * length // max(1, _bytes(self._slice(name))))
        for start in range(0, length, step):
            rows = slice(start, start + step)
            yield rows, self.rows(name, rows)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor, as they are stored."""
        block = self._slice(name)[rows]
        self._read += block.numel() * block.element_size()
        return block


def _bytes(part) -> int:
    return torch.Size(part.get_shape()).numel() * (8 if part.get_dtype() == "F64" else 4)


def shards(index: Path) -> list[str]:
    """The files that an index names; CheckpointError unless each is a safetensors file beside it."""
    return sorted(set(_places(index).values()))


def _places(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no 'weight_map' from tensors to files")
    for name, shard in places.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} puts {name!r} in {shard!r}, which is no safetensors file's name in this folder"
            )
    return places


def read_json(file: Path) -> dict:
    """A JSON object, or a CheckpointError that names the file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no {file}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return data
