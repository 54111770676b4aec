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

from llmlib.attention import blocks_ended
from llmlib.context import Context
from llmlib.errors import require
from llmlib.model import Block, CausalLM, ModelConfig
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
    window = max(t, s) if window is None else window
    ahead = 1 if causal else window
    return sum(max(0, min(s, i + ahead) - max(0, i + 1 - window)) for i in range(s - t, s))


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


def _selected_attention_work(masked, q, k, v, chosen, *, block_size=1, **_) -> int:
    """Each query meets as many whole blocks as it chose and there are, and its own up to itself."""
    (b, h, t, d), s, n = q.shape, k.shape[2], chosen.shape[-1]
    behind = [(min(n, i // block_size + 1) - 1) * block_size + i % block_size + 1 for i in range(s - t, s)]
    pairs = sum(behind) if masked else t * min(s, n * block_size)
    return 2 * b * h * pairs * (d + v.shape[-1])


def _unchosen(q, k, v, chosen, *, block_size=1, **_) -> int:
    """How many keys before its own one query leaves unread. Its own block is one of the chosen, but single keys may all
    be of the past. Heads that share keys are counted as if no two chose the same block of the past."""
    past, choices = (k.shape[2] - 1) // block_size, max(1, chosen.shape[1] // k.shape[1])
    return (past - min(past, choices * (chosen.shape[-1] - (block_size > 1)))) * block_size


def _compressed_attention_work(masked, q, k, v, *, length, block_size, stride, **_) -> int:
    (b, h, t, d), n = q.shape, k.shape[2]
    ended = sum(blocks_ended(i, block_size, stride) for i in range(length - t + 1, length + 1))
    return 2 * b * h * (ended if masked else t * n) * (d + v.shape[-1])


def _index_scores_work(masked, q, k, weights) -> int:
    (b, h, t, d), s = q.shape, k.shape[2]
    return 2 * b * h * (visible_pairs(t, s) if masked else t * s) * (d + 1)


WORK = {
    "attention": _attention_work,
    "compressed_attention": _compressed_attention_work,
    "index_scores": _index_scores_work,
    "path_attention": _path_work,
    "selected_attention": _selected_attention_work,
    "selective_scan": _selective_scan_work,
}
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
    residual: float = 0

    @property
    def total(self) -> float:
        return self.embedding + self.mixer + self.ffn + self.norm + self.head + self.residual

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
    idle = _untouched(config, 1) if active else 0
    mixer = _count(*(part for b in blocks for part in (b.mixer, b.cross)))
    ffn = _count(*(b.ffn for b in blocks)) - idle
    embedding = _count(model.embedding, model.position)
    head = _count(model.head)
    residual = _count(*(part for b in blocks for part in b.connections()))
    norm = model.num_parameters() - idle - mixer - ffn - embedding - head - residual
    return Parts(embedding, mixer, ffn, norm, head, residual)


def _empty(config: ModelConfig, batch: int, time: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(batch, time, config.d_model, device="meta", dtype=dtype)


def _context(model: CausalLM, batch: int, time: int, memory: int) -> Context:
    """The company of one pass of `time` tokens over a memory of `memory` tokens, where a layer reads one."""
    widths = [m.d_memory for m in model.modules() if hasattr(m, "d_memory")]
    require(
        memory >= 1 or not widths, f"memory is {memory}, and layers of this model read one: give its length in tokens"
    )
    dtype = model.embedding.weight.dtype
    read = torch.empty(batch, memory, widths[0], device="meta", dtype=dtype) if widths else None
    return Context(embeddings=_empty(model.config, batch, time, dtype), memory=read)


def _mix(block: Block, x: Tensor, state: dict | None, context: Context) -> None:
    """Run what looks beyond a token: the mixer, and the cross-attention on a memory."""
    if block.mixer is not None:
        block.mixer(x, state, context)
    if block.cross is not None:
        block.cross(x, None if state is None else state.setdefault("cross", {}), context)


def flops(config: ModelConfig, time: int, cached: int = 0, *, masked: bool = True, memory: int = 0) -> Parts:
    """FLOPs of one forward pass of `time` new tokens behind `cached` ones, by part.

    Cross-attention counts as a mixer; `memory` is the length of what it reads, projected once, with the first tokens.
    Training costs three times as much: the backward pass of a product is two products of the same size. For one
    generated token at context n use flops(config, 1, n - 1). ConfigError for a time below 1.
    """
    require(
        time >= 1 and cached >= 0, f"time is {time} and cached {cached}; there must be a token, and no fewer than 0"
    )
    model, done = skeleton(config), {}
    earlier, now = (_context(model, 1, n, memory) for n in (cached, time))
    for block in model.layers:
        if block.layer not in done:
            done[block.layer] = _block_flops(block, earlier, now, masked)
    mixer, ffn, residual = (sum(done[b.layer][i] for b in model.layers) for i in range(3))
    with Counter() as counter, torch.no_grad():
        model.logits(_empty(config, 1, time))
    return Parts(mixer=mixer, ffn=ffn, head=counter.flops, residual=residual)


@torch.no_grad()
def _block_flops(block: Block, earlier: Context, now: Context, masked: bool) -> tuple[int, int, int]:
    """(mixer, feed-forward, residual connections) for the tokens of `now`, behind those of `earlier`."""
    x, state = now.embeddings, None
    if earlier.embeddings.shape[1]:
        state = {}
        _mix(block, earlier.embeddings, state, earlier)
    with Counter(masked) as mixer:
        _mix(block, x, state, now)
    with Counter(masked) as ffn:
        if block.ffn is not None:
            block.ffn(x)
    with Counter() as residual:
        for connection in block.connections():
            connection(connection.widen(x))
    return mixer.flops, ffn.flops, residual.flops


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
def cache(
    config: ModelConfig, length: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16, memory: int = 0
) -> int:
    """Bytes of keys, values, latents and states after `length` tokens, when room for just so many was reserved.

    Cross-attention keeps the keys and values of a memory of `memory` tokens. ConfigError for a length below 1.
    """
    require(length >= 1, f"length is {length}; a cache needs at least one token")
    model = skeleton(config, dtype)
    state = model.new_state(reserve=length)
    sizes, context = {}, _context(model, batch, length, memory)
    for block, kept in zip(model.layers, state, strict=True):
        if block.layer not in sizes:
            _mix(block, context.embeddings, kept, context)
            sizes[block.layer] = state_bytes([kept])
    return sum(sizes[block.layer] for block in model.layers)


@torch.no_grad()
def cache_read(
    config: ModelConfig, context: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16, memory: int = 0
) -> int:
    """Bytes that one more token behind `context` others for each sequence reads of the caches.

    That is all they hold, but of keys and values among which a layer chooses (MoBA, NSA, DSA) the chosen alone: DSA
    reads its indexer's keys whole, and MoBA its own, for it keeps no means of them. A layer that borrows keys and
    values reads them again.
    """
    require(context >= 1, f"context is {context}; there is a cache to read after at least one token")
    model = skeleton(config, dtype)
    state, sizes, reads = model.new_state(reserve=context), {}, _Reads()
    earlier, now = (_context(model, batch, n, memory) for n in (context, 1))
    for block, kept in zip(model.layers, state, strict=True):
        if block.layer not in sizes:
            _mix(block, earlier.embeddings, kept, earlier)
            reads.bytes = reads.held = state_bytes([kept]) - _unfilled(kept)
            with metered(reads):
                _mix(block, now.embeddings, kept, now)
            sizes[block.layer] = reads.bytes
    return sum(sizes[block.layer] for block in model.layers)


class _Reads:
    """A meter that takes from `bytes` what the ops of a layer's step leave of the `held` ones, and adds what another
    layer holds and they read."""

    def __init__(self):
        self.bytes, self.held, self.known, self.whole = 0, 0, [], []

    def __call__(self, op, args, kwargs):
        if op.name == "mean_key_scores":
            self.whole.append(args[1])
        if op.name == "selected_attention":
            parts = {id(x): x for x in args[1:3] if not any(x is y for y in self.whole)}.values()
            self.bytes -= sum(x.nbytes // x.shape[2] for x in parts) * _unchosen(*args, **kwargs)
        if op.name == "attention":
            self._attention(args[1], kwargs.get("window"))
        return op.run(*args, **kwargs)

    def _attention(self, k: Tensor, window: int | None) -> None:
        owner = next((held for known, held in self.known if known is k), None)
        if owner is None:
            self.known.append((k, self.held))
        else:
            cached = max(1, k.shape[2] - 1)
            self.bytes += owner if window is None else owner * min(cached, window - 1) // cached


def _unfilled(state) -> int:
    """Bytes of the slots that no token has filled yet."""
    if not isinstance(state, dict):
        return 0
    buffers = [x for x in state.values() if isinstance(x, Tensor) and x.ndim == 4] if "length" in state else []
    empty = sum(x.nbytes // x.shape[2] * max(0, x.shape[2] - state["length"]) for x in buffers)
    return empty + sum(_unfilled(x) for x in state.values())


def cache_per_token(
    config: ModelConfig, length: int = 4096, dtype: torch.dtype = torch.bfloat16, memory: int = 0
) -> float:
    """Bytes that the cache grows by for each further token at this length: 0 under a full window and for a state."""
    longer, shorter = (cache(config, n, dtype=dtype, memory=memory) for n in (length + 64, length))
    return (longer - shorter) / 64


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


def prefill(
    config: ModelConfig, time: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16, memory: int = 0
) -> Step:
    """Reading a prompt: each weight once for the whole batch, of tables the rows used, and the cache written once."""
    parts = parameters(config)
    weights = parts.total - parts.embedding + _rows(config, batch * time, time)
    work = batch * flops(config, time, memory=memory).total
    return Step(work, weights * dtype.itemsize, cache(config, time, batch, dtype, memory))


def decode(
    config: ModelConfig, context: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16, memory: int = 0
) -> Step:
    """One more token behind `context` others for each sequence: the weights are read once, the caches by `cache_read`.

    Of routed experts a batch touches at most batch · top_k; this counts those, as if no two tokens shared one. Of the
    embedding it reads one row for each token, of learned positions one, and of cross-attention no map of the memory.
    """
    parts = parameters(config)
    weights = parts.mixer - _memory_maps(config) + parts.norm + parts.residual + parts.ffn - _untouched(config, batch)
    weights += parts.head + _rows(config, batch, 1)
    return Step(
        batch * flops(config, 1, context, memory=memory).total,
        weights * dtype.itemsize,
        cache_read(config, context, batch, dtype, memory),
    )


def _rows(config: ModelConfig, tokens: int, places: int) -> int:
    """Numbers read of the tables: a row for each token and for each place, and all of an embedding that is the head."""
    model = skeleton(config)
    embedding, position = _count(model.embedding), _count(model.position)
    rows = embedding if model.head is None else min(tokens * config.d_model, embedding)
    return rows + min(places * config.d_model, position)


def _memory_maps(config: ModelConfig) -> int:
    """Parameters that make keys and values of a memory, which the cache then holds."""
    layers = [m for m in skeleton(config).modules() if hasattr(m, "d_memory")]
    return _count(*(part for m in layers for part in (m.k_proj, m.v_proj, m.k_norm)))


def _untouched(config: ModelConfig, tokens: int) -> int:
    """Parameters of routed experts that so many tokens leave out, when no two of them share an expert."""
    blocks = dict.fromkeys(skeleton(config).layers)
    mixtures = [m for b in blocks for m in b.modules() if hasattr(m, "num_idle_parameters")]
    sizes = ((m.num_routed_parameters(), m.num_idle_parameters()) for m in mixtures)
    return sum(max(whole - tokens * (whole - idle), 0) for whole, idle in sizes)


def memory(
    config: ModelConfig,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    training: bool = False,
    memory: int = 0,
) -> dict[str, float]:
    """Bytes by purpose. To generate: weights, and the cache, cross-attention's on `memory` tokens included. To train,
    without activations: weights and gradients in `dtype`, and AdamW's float32 master copy and two moments (12 bytes
    for each parameter)."""
    count = parameters(config).total
    if not training:
        return {"weights": count * dtype.itemsize, "cache": cache(config, context, batch, dtype, memory)}
    return {"weights": count * dtype.itemsize, "gradients": count * dtype.itemsize, "optimiser": 12.0 * count}
