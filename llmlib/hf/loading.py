"""`load`: a published checkpoint as a model, by its family's table."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from llmlib.errors import CheckpointError, ConfigError, UnsupportedArchitectureError, require
from llmlib.hf.checkpoint import Checkpoint, read_json
from llmlib.hf.hub import DESCRIPTION, fetch, fetch_weights
from llmlib.hf.keys import Keys
from llmlib.hf.quantised import Quantised, dequantised, reader_of
from llmlib.hf.tables import fill, place
from llmlib.model import CausalLM, ModelConfig


@dataclass(frozen=True)
class Family:
    """How one `model_type` is read.

    read    config.json as a ModelConfig
    table   llmlib's names → stored names (see `tables`)
    prefix  what every stored name but the head's starts with, in files that were saved with it
    buffers  patterns of stored tensors that hold no weights: masks, inverse frequencies
    choose  for families whose rows depend on the layer: (config, layer index) → a table that goes before `table`
    """

    read: Callable[[Keys], ModelConfig]
    table: dict[str, str]
    prefix: str = "model."
    buffers: tuple[str, ...] = ()
    choose: Callable[[ModelConfig, int], dict[str, str]] | None = None


FAMILIES: dict[str, Family] = {}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def family(model_type: str, **settings) -> Callable:
    """Register the decorated config reader, with its table, as the family of `model_type`."""

    def register(read: Callable[[Keys], ModelConfig]) -> Callable[[Keys], ModelConfig]:
        FAMILIES[model_type] = Family(read, **settings)
        return read

    return register


def load(path_or_id: str | Path, device=None, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A published model, ready to compute: `load("folder")` or, with a network, `load("openai-community/gpt2")`.

    path_or_id  a folder with config.json and safetensors, or owner/name on the Hugging Face hub, if need be with
                @revision; what was fetched once is read from the hub's cache, without a network too
    device      where to put it (the CPU by default); dtype  what to compute in, whatever the file stores
    Weights are read block by block straight into place, so memory never holds much more than the model. Those that are
    stored in 4 or 8 bits (gpt-oss's MXFP4, DeepSeek-V3's FP8) become what they stand for, in that dtype.
    Raises CheckpointError (a file, tensor or key is missing, surplus, broken or of the wrong shape) and
    UnsupportedArchitectureError (an unknown model_type, or a key that would change the result and isn't understood);
    ConfigError for a dtype that isn't floating point of 16 bits or more.
    """
    require(dtype in DTYPES, f"dtype is {dtype!r}, and must be {' or '.join(map(str, DTYPES))}")
    folder = find(path_or_id)
    config, chosen = read_config(folder)
    file = folder / "config.json"
    source = dequantised(read_json(file), file, Checkpoint(folder))
    with _blamed_on(file), torch.device("meta"):
        model = CausalLM(config)
    model = model.to(dtype).to_empty(device=device or "cpu")
    fill_model(model, chosen, source)
    return model.eval().requires_grad_(False)


def find(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """A local folder; or the one in the hub's cache, where `huggingface_hub` puts what isn't there yet.

    path_or_id  a folder, or owner/name on the hub, or owner/name@revision (a branch, tag or commit; main by default)
    weights     False fetches the config and the tokenizer only
    No weights are fetched before the config is understood, and never a pickle file. Raises CheckpointError, with the
    remedy, where there is no such folder and the hub can't give one; and what `read_config` raises.
    """
    path = os.path.expanduser(path_or_id)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file: give the folder that it is in")
    name, _, revision = str(path_or_id).partition("@")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise CheckpointError(f"there is no folder {path}")
    folder = fetch(name, revision or None, DESCRIPTION)
    if weights:
        read_config(folder)
        fetch_weights(name, folder)
    return folder


def read_config(folder: Path) -> tuple[ModelConfig, Family]:
    """The config of a checkpoint's folder, and the family that reads it.

    Raises what `load` does for a config.json that can't be read, and for weights that aren't the whole model as they
    stand: those that an adapter changes, and quantised ones of a format that `quantised` doesn't read.
    """
    import llmlib.hf.families  # noqa: F401  (registers them)

    file = Path(folder) / "config.json"
    if (adapter := file.with_name("adapter_config.json")).exists():
        raise CheckpointError(
            f"{adapter} says that an adapter belongs to these weights, and llmlib reads none: merge it into them first "
            f"(merge_and_unload of peft), save the merged model, and load that"
        )
    data = read_json(file)
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedArchitectureError(
            f"{file}: model_type is {kind!r}; llmlib reads {', '.join(sorted(FAMILIES))}"
        )
    reader_of(data, file)
    keys = Keys(data, file)
    keys.ignore("quantization_config")  # known by now
    with _blamed_on(file):
        config = FAMILIES[kind].read(keys)
    keys.finish()
    return config, FAMILIES[kind]


@contextlib.contextmanager
def _blamed_on(file: Path) -> Iterator[None]:
    """Turn what goes wrong with a file's values into a CheckpointError that names it."""
    try:
        yield
    except (CheckpointError, UnsupportedArchitectureError):
        raise
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{file}: a value has the wrong type or size ({error!r})") from None


@torch.no_grad()
def fill_model(model: CausalLM, chosen: Family, source: Checkpoint | Quantised) -> None:
    """Copy every weight into place; every parameter and buffer must be filled, and every stored tensor used."""
    source = _Prefixed(source, chosen.prefix)
    used: set[str] = set()
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        row, i = place(name)
        table = chosen.table if i is None or chosen.choose is None else chosen.table | chosen.choose(model.config, i)
        if row not in table:
            raise CheckpointError(f"the table of {model.config.name or 'this family'} has no row for {name}")
        owner = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0] if i is not None else "")
        used.update(fill(parameter, table[row], i, owner, source, name))
    surplus = [n for n in source if n not in used and not any(re.search(p, n) for p in chosen.buffers)]
    if model.head is None:
        surplus = [n for n in surplus if not _repeats_embedding(n, model.embedding, source)]
    if surplus:
        raise CheckpointError(
            f"{source.listing} holds {len(surplus)} tensor{'s' * (len(surplus) > 1)} that this config has no place for"
            f": {', '.join(sorted(surplus)[:4])}{' …' if len(surplus) > 4 else ''}"
        )


def _repeats_embedding(name: str, embedding: nn.Embedding, source) -> bool:
    """Whether a tensor is the tied head, stored once more; a head of other numbers is an error."""
    if not name.endswith(("lm_head.weight", "embed_out.weight")):
        return False
    source.require_floats(name)
    if source.shape(name) != tuple(embedding.weight.shape) or not _equal(embedding.weight, name, source):
        raise CheckpointError(
            f"{source.files[name]}: the config ties the head to the embedding, and {name!r} differs from it"
        )
    return True


def _equal(weight: Tensor, name: str, source) -> bool:
    """Whether a stored tensor holds the same numbers, compared piece by piece in one piece's room."""
    room = None
    for rows, block in source.blocks(name):
        part = weight[rows]
        room = torch.empty_like(part) if room is None else room[: len(part)]
        if not torch.equal(room.copy_(block), part):
            return False
    return True


@dataclass
class _Prefixed:
    """A checkpoint seen under the names of the table, whether it was saved with the family's prefix or without."""

    source: Checkpoint | Quantised
    prefix: str
    bare: bool = field(init=False)

    def __post_init__(self):
        self.bare = not any(name.startswith(self.prefix) for name in self.source)
        self.listing = self.source.listing
        self.files = {self._seen(name): file for name, file in self.source.files.items()}

    def _seen(self, name: str) -> str:
        return self.prefix + name if self.bare and not _is_head(name) else name

    def _stored(self, name: str) -> str:
        return name.removeprefix(self.prefix) if self.bare else name

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self):
        return iter(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self._stored(name))

    def require_floats(self, name: str) -> None:
        self.source.require_floats(self._stored(name))

    def read(self, name: str) -> Tensor:
        return self.source.read(self._stored(name))

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        return self.source.blocks(self._stored(name))

    def copy_(self, target: Tensor, name: str) -> None:
        self.source.copy_(target, self._stored(name))


def _is_head(name: str) -> bool:
    return name.startswith(("lm_head.", "embed_out."))
