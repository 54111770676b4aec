"""What a model costs: parameters, FLOPs, bytes and cache, counted on the model itself, built without memory.

Every figure comes from the modules: they are built on torch's "meta" device, where tensors have shapes and no numbers,
run there, and what they do is counted. So 405 billion parameters are counted on a laptop, and no formula stands twice.

Conventions. A FLOP is one multiply or one add of a matrix product, a convolution or a scan; norms, activations and
softmax aren't counted, as in the field's papers. Attention counts the query–key pairs that the mask lets through
(`masked=True`), or all of them, as PaLM's appendix B (arXiv 2204.02311) and most fused kernels' benchmarks do.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmlib.context import Context
from llmlib.errors import require
from llmlib.model import CausalLM, ModelConfig
from llmlib.ops import metered

aten = torch.ops.aten

_PRODUCTS = {
    aten.mm.default: lambda out, a, b: 2 * out.numel() * a.shape[-1],
    aten.mm.out: lambda out, a, b: 2 * out.numel() * a.shape[-1],
    aten.bmm.default: lambda out, a, b: 2 * out.numel() * a.shape[-1],
    aten.addmm.default: lambda out, bias, a, b: 2 * out.numel() * a.shape[-1],
    aten.addmm.out: lambda out, bias, a, b: 2 * out.numel() * a.shape[-1],
    aten.baddbmm.default: lambda out, c, a, b: 2 * out.numel() * a.shape[-1],
    aten._grouped_mm.default: lambda out, a, b, *_: 2 * out.numel() * a.shape[-1],
    aten.convolution.default: lambda out, x, weight, *_: 2 * out.numel() * weight[0].numel(),
}


def visible_pairs(t: int, s: int, causal: bool = True, window: int | None = None) -> int:
    """How many of the t · s pairs a mask lets through, when the last query lines up with the last key."""
    window = s if window is None else window
    behind = [min(i + 1, window) for i in range(s - t, s)]
    if causal:
        return sum(behind)
    return sum(n + min(s - 1 - i, window - 1) for i, n in enumerate(behind, start=s - t))


def _attention_work(masked, q, k, v, *, causal=True, window=None, **_) -> int:
    b, h, t, d = q.shape
    pairs = visible_pairs(t, k.shape[2], causal, window) if masked else t * k.shape[2]
    return 2 * b * h * pairs * (d + v.shape[-1])


def _selective_scan_work(_masked, x, dt, A, B, C, D=None, **_) -> int:
    """9 for each step, channel and state: exp(dt·A), dt·B·x, the update and the sum over C, as its authors count."""
    return 9 * x.numel() * A.shape[-1] + (0 if D is None else 2 * x.numel())


def _path_work(masked, q, k, v, w, beta, *_, chunk_size=64, **__) -> int:
    """Attention's, and what turns the keys, in whole chunks of c: 4d + c for each pair and key head (w·k, the update,
    the triangular system), 2c for each pair and query head, 2cd for each token and head (w·w and q·w)."""
    (b, h, t, d), (_, g, s, _) = q.shape, k.shape
    c, pairs = min(chunk_size, t), visible_pairs(t, s) if masked else t * s
    turning = pairs * (g * (4 * d + c) + 2 * h * c) + 2 * t * c * d * (g + h)
    return _attention_work(masked, q, k, v) + b * turning


WORK = {"attention": _attention_work, "path_attention": _path_work, "selective_scan": _selective_scan_work}
"""FLOPs of the ops whose kernels do less, or something else, than the products in their reference."""


class Counter(TorchDispatchMode):
    """Counts the FLOPs of what runs inside: each product and convolution, and each op of `WORK` by its own formula."""

    def __init__(self, masked: bool = True):
        super().__init__()
        self.flops, self.masked, self._inside_op, self._meter = 0, masked, False, None

    def __enter__(self):
        self._meter = metered(self._op)
        self._meter.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._meter.__exit__(*error)

    def _op(self, op, args, kwargs):
        if op.name not in WORK or self._inside_op:
            return op.run(*args, **kwargs)
        self.flops += WORK[op.name](self.masked, *args, **kwargs)
        self._inside_op = True
        try:
            return op.run(*args, **kwargs)
        finally:
            self._inside_op = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and not self._inside_op:
            self.flops += _PRODUCTS[func](out, *args)
        return out


@dataclass(frozen=True)
class Parts:
    """One figure for each part of a model, and their total."""

    embedding: float = 0
    mixer: float = 0
    ffn: float = 0
    norm: float = 0
    head: float = 0

    @property
    def total(self) -> float:
        return self.embedding + self.mixer + self.ffn + self.norm + self.head

    def as_dict(self) -> dict[str, float]:
        """The parts by name, and their total."""
        return {name: getattr(self, name) for name in (*self.__dataclass_fields__, "total")}


@functools.lru_cache(maxsize=32)
def skeleton(config: ModelConfig, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model on the meta device: every shape, no memory."""
    with torch.device("meta"):
        return CausalLM(config).to(dtype)


def _count(*modules: nn.Module | None) -> int:
    """Parameters of some modules together; a tensor that several hold counts once."""
    return sum(p.numel() for p in {id(p): p for m in modules if m is not None for p in m.parameters()}.values())


def parameters(config: ModelConfig, *, active: bool = False) -> Parts:
    """How many parameters each part holds; a tied head holds none.

    active=True counts what one token passes through: of routed experts only the `top_k` that it takes, of everything
    else all of it, embedding and head included.
    """
    model = skeleton(config)
    blocks = list(dict.fromkeys(model.layers))
    idle = 0
    if active:
        idle = sum(m.num_idle_parameters() for b in blocks for m in b.modules() if hasattr(m, "num_idle_parameters"))
    mixer = _count(*(part for b in blocks for part in (b.mixer, b.cross)))
    ffn = _count(*(b.ffn for b in blocks)) - idle
    embedding = _count(model.embedding, model.position)
    head = _count(model.head)
    return Parts(embedding, mixer, ffn, model.num_parameters() - idle - mixer - ffn - embedding - head, head)


def _empty(config: ModelConfig, batch: int, time: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(batch, time, config.d_model, device="meta", dtype=dtype)


def _context(*sizes) -> Context:
    """What the layers of one pass share: a block of weights in one of them serves others (Zamba2)."""
    return Context(embeddings=_empty(*sizes))


def flops(config: ModelConfig, time: int, cached: int = 0, *, masked: bool = True) -> Parts:
    """FLOPs of one forward pass of `time` new tokens behind `cached` ones, by part.

    Training costs three times as much: the backward pass of a product is two products of the same size. For one
    generated token at context n use flops(config, 1, n - 1).
    """
    require(
        time >= 1 and cached >= 0, f"time is {time} and cached {cached}; there must be a token, and no fewer than 0"
    )
    model, done = skeleton(config), {}
    before, now = _context(config, 1, cached), _context(config, 1, time)
    for block in model.layers:
        if block.layer not in done:
            done[block.layer] = _block_flops(block, before, now, masked)
    mixer = sum(done[b.layer][0] for b in model.layers)
    ffn = sum(done[b.layer][1] for b in model.layers)
    with Counter() as counter, torch.no_grad():
        model.logits(_empty(config, 1, time))
    return Parts(mixer=mixer, ffn=ffn, head=counter.flops)


@torch.no_grad()
def _block_flops(block, before: Context, now: Context, masked: bool) -> tuple[int, int]:
    state, counted = None, []
    if block.mixer is not None and before.embeddings.shape[1]:
        state = {}
        block.mixer(before.embeddings, state, before)
    for part, *args in ((block.mixer, state, now), (block.ffn,)):
        with Counter(masked) as counter:
            if part is not None:
                part(now.embeddings, *args)
        counted.append(counter.flops)
    return tuple(counted)


def state_bytes(state) -> int:
    """Bytes that a state's tensors hold, what is allocated ahead included."""
    tensors = {id(x): x for layer in state for x in _tensors(layer)}
    return sum(x.untyped_storage().nbytes() for x in tensors.values())


def _tensors(thing):
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(part)


@torch.no_grad()
def cache(config: ModelConfig, length: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys, values, latents and states after `length` tokens, when room for just so many was reserved."""
    require(length >= 1, f"length is {length}; a cache needs at least one token")
    model = skeleton(config, dtype)
    state, context = model.new_state(reserve=length), _context(config, batch, length, dtype)
    sizes = {}
    for block, kept in zip(model.layers, state, strict=True):
        if block.layer not in sizes and block.mixer is not None:
            block.mixer(context.embeddings, kept, context)
            sizes[block.layer] = state_bytes([kept])
    return sum(sizes.get(block.layer, 0) for block in model.layers)


def cache_per_token(config: ModelConfig, length: int = 4096, dtype: torch.dtype = torch.bfloat16) -> float:
    """Bytes that the cache grows by for each further token at this length: 0 under a full window and for a state."""
    return (cache(config, length + 64, dtype=dtype) - cache(config, length, dtype=dtype)) / 64


@dataclass(frozen=True)
class Step:
    """One pass: its FLOPs, the bytes it must at least read and write, and their ratio."""

    flops: float
    weight_bytes: float
    cache_bytes: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte. Below the device's FLOPs per second over bytes per second, memory decides the time."""
        return self.flops / self.bytes

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline: no less than the slower of computing and moving takes."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def prefill(config: ModelConfig, time: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Step:
    """Reading a prompt: each weight once for the whole batch, and the cache written once."""
    weights = parameters(config).total * dtype.itemsize
    return Step(batch * flops(config, time).total, weights, cache(config, time, batch, dtype))


def decode(config: ModelConfig, context: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Step:
    """One more token behind `context` others for each sequence: the weights are read once, every cache whole.

    Of routed experts a batch touches at most batch · top_k; this counts those, as if no two tokens shared one. Of the
    embedding it reads one row for each token.
    """
    config_parts, active = parameters(config), parameters(config, active=True)
    touched = min(config_parts.ffn, active.ffn + (batch - 1) * _routed(config))
    weights = config_parts.mixer + config_parts.norm + touched + (config_parts.head or config_parts.embedding)
    rows = 0 if config.tie_embeddings else batch * config.d_model
    return Step(
        batch * flops(config, 1, context).total,
        (weights + rows) * dtype.itemsize,
        cache(config, context, batch, dtype),
    )


def _routed(config: ModelConfig) -> int:
    """Parameters of the routed experts that one token takes."""
    blocks = dict.fromkeys(skeleton(config).layers)
    modules = [m for b in blocks for m in b.modules() if hasattr(m, "num_idle_parameters")]
    return sum(m.num_routed_parameters() - m.num_idle_parameters() for m in modules)


def memory(
    config: ModelConfig,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    training: bool = False,
) -> dict[str, float]:
    """Bytes by purpose. To generate: weights and cache. To train, without activations: weights and gradients in
    `dtype`, and AdamW's float32 master copy and two moments (12 bytes for each parameter)."""
    count = parameters(config).total
    if not training:
        return {"weights": count * dtype.itemsize, "cache": cache(config, context, batch, dtype)}
    return {"weights": count * dtype.itemsize, "gradients": count * dtype.itemsize, "optimiser": 12.0 * count}
