"""A model is data: a tuple of layers, each naming its parts. This file assembles them and imports none of them."""

import dataclasses
import difflib
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmlib.context import Context, positions_in_text
from llmlib.errors import ConfigError, require
from llmlib.generate import generate
from llmlib.ops import available, op
from llmlib.yaml12 import read_yaml

PLACEMENTS = ("pre", "post", "inside", "sandwich")


class Spec:
    """A component and its options, without its width: `spec(Attention, num_heads=8)(d_model)` builds it.

    Two specs are equal when they name the same class and options. An option that the class doesn't have is an error
    here, where it is written, rather than later, where the model is built.
    """

    def __init__(self, cls: Callable, **options):
        known = inspect.signature(cls).parameters
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"{cls.__name__} has no option {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; "
                    f"it has {', '.join(list(known)[1:])}"
                )
        self.cls, self.options = cls, {k: _with_tuples(v) for k, v in options.items()}

    def __call__(self, *sizes, **more) -> nn.Module:
        return self.cls(*sizes, **{**self.options, **more})

    def replace(self, **changes) -> "Spec":
        """A copy with some options changed."""
        return Spec(self.cls, **{**self.options, **changes})

    def __repr__(self) -> str:
        return f"spec({', '.join([self.cls.__name__] + [f'{k}={v!r}' for k, v in self.options.items()])})"

    def __eq__(self, other) -> bool:
        return isinstance(other, Spec) and (self.cls, self.options) == (other.cls, other.options)

    def __hash__(self) -> int:
        return hash((self.cls, frozenset(self.options)))


spec = Spec


def _with_tuples(value):
    """Lists as tuples, at any depth, as `from_yaml` reads them."""
    if isinstance(value, list | tuple):
        return tuple(_with_tuples(v) for v in value)
    return {k: _with_tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Layer:
    """One layer: a mixer, which moves information between positions, and a feed-forward, which works on each alone.

    placement  where the norms stand, f being the mixer or the feed-forward:
               "pre"       x + f(norm(x))            GPT-2, Llama
               "post"      norm(x + f(x))            the transformer of 2017
               "inside"    x + norm(f(x))            OLMo 2
               "sandwich"  x + norm(f(norm(x)))      Gemma 2; with `embedding_norm`, Peri-LN
    parallel   x + mixer(norm(x)) + ffn(norm(x)); parallel_norms is 1 (shared) or 2
    residual_scale  multiplies what f adds (Granite), skip_scale what it is added to (DeepNorm's α)
    cross      a mixer between the two that reads `context.memory`, in a decoder over an encoder
    norm       replaces the model's norm in this layer
    shared     layers with the same name here share one set of weights
    """

    mixer: Spec | None = None
    ffn: Spec | None = None
    cross: Spec | None = None
    norm: Spec | None = None
    placement: str = "pre"
    parallel: bool = False
    parallel_norms: int = 1
    residual_scale: float = 1.0
    skip_scale: float = 1.0
    shared: str | None = None

    def __post_init__(self):
        for name in ("mixer", "ffn", "cross", "norm"):
            value = getattr(self, name)
            require(
                value is None or isinstance(value, Spec),
                f"Layer.{name} is {value!r}, and must be a spec, such as spec(RMSNorm, eps=1e-5), or None",
            )
        require(
            self.placement in PLACEMENTS,
            f"Layer.placement is {self.placement!r}; choose one of {', '.join(PLACEMENTS)}",
        )
        require(self.parallel_norms in (1, 2), f"Layer.parallel_norms is {self.parallel_norms}, and must be 1 or 2")
        require(
            not self.parallel or (self.placement == "pre" and self.mixer and self.ffn and not self.cross),
            "a parallel layer has a mixer, a feed-forward, no cross-attention, and placement='pre'",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a model's shape: sizes, a norm, and the tuple of its layers.

    position         a spec for positions added to the embedding (learned, sinusoidal); rotary ones belong to attention
    embedding_scale  multiplies the embedding (Gemma: √d_model; Granite: its multiplier)
    embedding_norm   a norm right after the embedding (Bloom, Peri-LN)
    final_norm       False leaves out the norm before the head
    residual         several residual streams in place of one (hyper-connections); None adds what a sublayer gives
    logit_scale, logit_softcap  logits = softcap · tanh(scale · logits / softcap)
    init_std         standard deviation of the initial weights; residual_init divides those that write to the
                     residual stream by √(number of sublayers), as GPT-2 does
    max_seq_len      the longest text that the model is meant for (information; learned positions enforce their own)
    """

    vocab_size: int
    d_model: int
    layers: tuple[Layer, ...]
    norm: Spec
    position: Spec | None = None
    embedding_scale: float = 1.0
    embedding_norm: Spec | None = None
    final_norm: bool = True
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    init_std: float = 0.02
    residual_init: bool = True
    max_seq_len: int | None = None
    residual: Spec | None = None
    name: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("vocab_size", "d_model"):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name} is {value!r}, and must be a whole number above 0")
        for i, layer in enumerate(self.layers):
            require(isinstance(layer, Layer), f"layers[{i}] is {layer!r}, and must be a Layer(mixer=…, ffn=…)")
        require(isinstance(self.norm, Spec), f"norm is {self.norm!r}, and must be a spec, such as spec(RMSNorm)")
        require(
            self.residual is None or isinstance(self.residual, Spec),
            f"residual is {self.residual!r}, and must be a spec, such as spec(HyperConnections, streams=4), or None",
        )

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed."""
        unknown = changes.keys() - {f.name for f in dataclasses.fields(self)}
        require(not unknown, f"ModelConfig has no field {', '.join(sorted(unknown))}; it has {_fields(ModelConfig)}")
        return dataclasses.replace(self, **changes)

    def to_yaml(self) -> str:
        """The config as YAML; runs of equal layers are written once, with `repeat`."""
        data = {k: _plain(v) for k, v in _changed(self).items() if k != "layers"}
        data["layers"] = [
            ({"repeat": n} if n > 1 else {}) | {k: _plain(v) for k, v in _changed(layer).items()}
            for layer, n in ((layer, len(list(run))) for layer, run in itertools.groupby(self.layers))
        ]
        return yaml.safe_dump(data, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "ModelConfig":
        """Read back what `to_yaml` wrote. An unknown key or component is a ConfigError that names it."""
        data = read_yaml(text)
        require(isinstance(data, dict), f"a model's YAML is a mapping of fields, and this is {type(data).__name__}")
        layers = []
        for i, entry in enumerate(data.pop("layers", [])):
            entry = dict(entry)
            repeat = entry.pop("repeat", 1)
            layers += [_build(Layer, entry, f"layers[{i}]")] * repeat
        return _build(cls, data | {"layers": tuple(layers)}, "config")


def _fields(cls) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _changed(thing) -> dict:
    """The fields of a dataclass that differ from their defaults."""
    return {f.name: v for f in dataclasses.fields(thing) if (v := getattr(thing, f.name)) != f.default}


def _plain(value):
    """A spec as {class: …, options}, everything else as YAML has it."""
    if isinstance(value, Spec):
        path = f"{value.cls.__module__}.{value.cls.__qualname__}"
        return {"class": path, **{k: _plain(v) for k, v in value.options.items()}}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _specs(value, where: str):
    """Undo `_plain`."""
    if isinstance(value, list):
        return tuple(_specs(v, where) for v in value)
    if not isinstance(value, dict):
        return value
    options = {k: _specs(v, f"{where}.{k}") for k, v in value.items() if k != "class"}
    if "class" not in value:
        return options
    module, _, name = value["class"].rpartition(".")
    try:
        return Spec(getattr(importlib.import_module(module), name), **options)
    except (ImportError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{where}: {error}") from None
        raise ConfigError(f"{where}: there is no component {value['class']!r} ({error})") from None


def _build(cls, data: dict, where: str):
    known = {f.name for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{where} has no key {key!r}{hint}; it has {_fields(cls)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in data]
    require(not missing, f"{where} lacks {', '.join(missing)}")
    return cls(**{k: v if k == "layers" else _specs(v, f"{where}.{k}") for k, v in data.items()})


class State(list):
    """What a model keeps between calls: one dict for each layer, and `length`, the number of tokens seen so far.

    reserve  tokens that caches make room for at once, when it is known how many will come
    """

    def __init__(self, num_layers: int, reserve: int = 0):
        super().__init__({"reserve": reserve} if reserve else {} for _ in range(num_layers))
        self.length = 0


class Block(nn.Module):
    """One `Layer`, built: mixer and feed-forward on a residual stream, with norms where `placement` puts them.

    With `residual`, x has several streams, (b t n d), and each sublayer a connection to them; `index` is the first's.
    """

    def __init__(self, layer: Layer, d_model: int, norm: Spec, residual: Spec | None = None, index: int = 0):
        super().__init__()
        self.layer, norm = layer, layer.norm or norm
        for name in ("mixer", "cross", "ffn"):
            part = getattr(layer, name)
            setattr(self, name, part and part(d_model))
            before = part and layer.placement != "inside" and not (layer.parallel and self._shares_norm(name))
            after = part and layer.placement in ("inside", "sandwich")
            setattr(self, f"{name}_norm", norm(d_model) if before else None)
            setattr(self, f"{name}_post_norm", norm(d_model) if after else None)
            connected = residual and part and not (layer.parallel and name == "ffn")
            setattr(self, f"{name}_residual", residual(d_model, index) if connected else None)
            index += bool(connected)

    def _shares_norm(self, name: str) -> bool:
        return name == "ffn" and self.layer.parallel_norms == 1

    def connections(self) -> list[nn.Module]:
        """Its residual connections, in order: one for each sublayer, one for both of a parallel layer."""
        return [part for part in (self.mixer_residual, self.cross_residual, self.ffn_residual) if part is not None]

    def forward(
        self, x: Float[Tensor, "b t *n d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t *n d"]:
        if self.layer.parallel:
            u, *kept = self._read(x, self.mixer_residual)
            h = self.mixer_norm(u)
            g = h if self.ffn_norm is None else self.ffn_norm(u)
            mixed = self.mixer(h, state, context)
            return self._add(mixed + self.ffn(g, *self._ffn_context(context)), *kept)
        if self.mixer is not None:
            x = self._sublayer("mixer", x, state, context)
        if self.cross is not None:
            x = self._sublayer("cross", x, None if state is None else state.setdefault("cross", {}), context)
        if self.ffn is not None:
            x = self._sublayer("ffn", x, *self._ffn_context(context))
        return x

    def _ffn_context(self, context: Context | None) -> tuple:
        """What the feed-forward is told besides x: each token is alone to it, but a mixture leaves padding out."""
        return (context,) if getattr(self.ffn, "takes_context", False) else ()

    def _sublayer(self, name, x, *args):
        f, norm, post_norm = getattr(self, name), getattr(self, f"{name}_norm"), getattr(self, f"{name}_post_norm")
        u, *kept = self._read(x, getattr(self, f"{name}_residual"))
        if self.layer.placement == "post":
            return norm(self._add(f(u, *args), *kept))
        y = f(u if norm is None else norm(u), *args)
        return self._add(y if post_norm is None else post_norm(y), *kept)

    def _read(self, x, connection):
        """What a sublayer reads, what passes beside it, and how much of its output each stream takes."""
        return (x, x, None) if connection is None else connection(x)

    def _add(self, y, x, share):
        y = y if share is None else share[..., None] * y[..., None, :]
        scale, skip = self.layer.residual_scale, self.layer.skip_scale
        return (x if skip == 1 else skip * x) + (y if scale == 1 else scale * y)


class Backbone(nn.Module):
    """Embedding, layers and final norm: tokens in, one vector for each token out.

    It is an encoder when its attention is bidirectional, and the body of a decoder when it is causal.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position = config.position and config.position(config.d_model)
        self.embedding_norm = config.embedding_norm and config.embedding_norm(config.d_model)
        self.layers = nn.ModuleList(self._blocks(config))
        self.final_norm = config.norm(config.d_model) if config.final_norm else None
        self._initialise()

    @staticmethod
    def _blocks(config: ModelConfig) -> Iterable[Block]:
        shared: dict[str, Block] = {}
        index = 0
        for i, layer in enumerate(config.layers):
            if layer.shared in shared:
                same = shared[layer.shared].layer
                require(
                    layer == same,
                    f"layers[{i}] shares weights as {layer.shared!r}, so it must equal the first such layer: {same}",
                )
                require(
                    not getattr(shared[layer.shared].ffn, "leaves_loss", False),
                    f"layers[{i}] shares weights as {layer.shared!r}, so only the auxiliary loss of its last pass "
                    f"would stay: set load_balance_alpha and z_loss_weight to 0, and balance by bias_update_rate",
                )
                yield shared[layer.shared]
                continue
            try:
                block = Block(layer, config.d_model, config.norm, config.residual, index)
            except ConfigError as error:
                raise ConfigError(f"layers[{i}]: {error}") from None
            index += len(block.connections())
            if layer.shared is not None:
                shared[layer.shared] = block
            yield block

    @torch.no_grad()
    def _initialise(self) -> None:
        std = self.config.init_std
        self.embedding.weight.normal_(0, std)
        blocks = dict.fromkeys(self.layers)  # in order, for the seed's sake
        parts = [p for block in blocks for p in (block.mixer, block.cross, block.ffn) if p is not None]
        if std != 0.02:
            for part in parts:
                part.reset_parameters(std=std)
        if self.config.residual_init:
            sublayers = sum(bool(layer.mixer) + bool(layer.cross) + bool(layer.ffn) for layer in self.config.layers)
            for name, weight in itertools.chain(*(part.named_parameters() for part in parts)):
                if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
                    weight.div_(math.sqrt(max(sublayers, 1)))

    def new_state(self, reserve: int = 0) -> State:
        """An empty state: pass it to every call to decode with caches. `reserve` makes room for so many tokens."""
        return State(len(self.layers), reserve)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: State | None = None,
        *,
        positions: Int[Tensor, "*b t"] | None = None,
        valid: Bool[Tensor, "b s"] | None = None,
        documents: Int[Tensor, "b s"] | None = None,
        memory: Float[Tensor, "b m _"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The residual stream after the last layer and the final norm.

        state      from `new_state()`; updated in place, so that a text can be fed in pieces
        positions  absolute positions; by default they count on from the state, or from the first valid token
                   of the text or of each document
        valid      False marks left padding (prompts of different lengths in a batch), over cached and new tokens
        documents  the document of each cached and new token, in packed text: nothing crosses a boundary
        memory     an encoder's output, read by cross-attention
        """
        t, seen = tokens.shape[1], state.length if state is not None else 0
        require(
            state is None or len(state) == len(self.layers),
            f"state has {state is not None and len(state)} layers and this model {len(self.layers)}: "
            f"is it the state of another model?",
            ValueError,
        )
        if positions is None and (valid is not None or documents is not None):
            positions = positions_in_text(valid, documents)[:, -t:]
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.position is not None:
            at = torch.arange(seen, seen + t, device=tokens.device) if positions is None else positions
            x = self.position(x, at)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        context = Context(positions, valid, documents, embeddings=x, memory=memory)
        ends = self._ends()
        x = x if ends is None else ends.widen(x)
        for i, block in enumerate(self.layers):
            x = block(x, None if state is None else state[i], context)
        if state is not None:
            state.length += t
        x = x if ends is None else ends.narrow(x)
        return x if self.final_norm is None else self.final_norm(x)

    def _ends(self) -> nn.Module | None:
        """A connection, to go from one stream to several and back; None where there is one throughout."""
        if self.config.residual is None:
            return None
        return next((connection for block in self.layers for connection in block.connections()), None)

    def num_parameters(self, trainable_only: bool = False) -> int:
        """How many numbers the model holds; a weight used twice counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def auxiliary_loss(self) -> Tensor | float:
        """The sum of what the layers of the last pass ask for besides the loss (load balancing, router z-loss, KL)."""
        return sum(m.auxiliary_loss for m in self.modules() if isinstance(getattr(m, "auxiliary_loss", None), Tensor))


class CausalLM(Backbone):
    """A language model: the backbone, and a head that turns each vector into a logit for every token."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
            nn.init.normal_(self.head.weight, 0, config.init_std)
            if config.head_bias:
                nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Int[Tensor, "b t"], state: State | None = None, **context) -> Float[Tensor, "b t v"]:
        """Logits in float32 for the token after each token; the other arguments are `Backbone.forward`'s."""
        return self.logits(super().forward(tokens, state, **context))

    def hidden(self, tokens: Int[Tensor, "b t"], state: State | None = None, **context) -> Float[Tensor, "b t d"]:
        """What the head sees: the backbone's output."""
        return super().forward(tokens, state, **context)

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """The head: softcap · tanh(scale · (W h + b) / softcap), in float32."""
        weight, bias = self._head()
        logits = F.linear(hidden, weight, bias).float()
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _head(self):
        return (self.embedding.weight, None) if self.head is None else (self.head.weight, self.head.bias)

    def loss(
        self, tokens: Int[Tensor, "b t"], targets: Int[Tensor, "b t"] | None = None, **context
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats per token. Without `targets`, a token's target is the next one; −100 is left out.

        The auxiliary loss isn't in it: add `auxiliary_loss()` when training a mixture of experts.
        """
        if targets is None:
            targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        hidden = self.hidden(tokens, **context)
        plain = self.config.logit_scale == 1 and self.config.logit_softcap is None
        if plain and self._head()[1] is None:
            return linear_cross_entropy(hidden.flatten(0, 1), self._head()[0], targets.flatten())
        return F.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten(), ignore_index=-100)

    def generate(
        self,
        tokens,
        max_new_tokens: int,
        temperature: float = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **options,
    ):
        """Continue `tokens` with caches; see `llmlib.generate.generate`."""
        return generate(
            self, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, **options
        )


@op
def linear_cross_entropy(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], targets: Int[Tensor, "n"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of `x Wᵀ` against `targets`, in nats: −(1/n) Σ log softmax(W xᵢ)[targetᵢ], in float32.

    Targets of −100 don't count. A fused twin never holds the n × v logits in memory at once.
    """
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-100)


def _liger_why_not(x, weight, targets) -> str | None:
    if not x.is_cuda:
        return "it is a GPU kernel, and the input is on the " + x.device.type.upper()
    return None if available("liger_kernel") else "liger-kernel is not installed: pip install liger-kernel"


@linear_cross_entropy.twin("liger", _liger_why_not)
def _liger_linear_cross_entropy(x, weight, targets):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)[0]


class Classifier(Backbone):
    """A backbone with a head over `num_classes` in place of the vocabulary.

    pool  which vector stands for the text: "last" (a causal model has read everything only there), "first", or "mean"
    """

    def __init__(self, config: ModelConfig, num_classes: int, pool: str = "last"):
        super().__init__(config)
        require(num_classes >= 2, f"num_classes is {num_classes}, and a choice needs at least 2")
        require(pool in ("last", "first", "mean"), f"pool is {pool!r}; choose 'last', 'first' or 'mean'")
        self.pool, self.head = pool, nn.Linear(config.d_model, num_classes)
        nn.init.normal_(self.head.weight, 0, config.init_std)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, tokens: Int[Tensor, "b t"], valid: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b classes"]:
        """Logits for each class; `valid` is False on left padding."""
        x = super().forward(tokens, valid=valid)
        if valid is None:
            valid = torch.ones_like(tokens, dtype=torch.bool)
        if self.pool == "mean":
            pooled = (x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        else:
            at = valid.int().argmax(1) if self.pool == "first" else torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
            pooled = x[torch.arange(len(x), device=x.device), at]
        return self.head(pooled)


class EncoderDecoder(nn.Module):
    """The transformer of 2017: an encoder reads the source once, and each layer of the decoder looks back at it.

    The decoder's layers have `cross`, a mixer that reads `context.memory`; both must have the same d_model.
    """

    def __init__(self, encoder: ModelConfig, decoder: ModelConfig):
        super().__init__()
        require(
            encoder.d_model == decoder.d_model,
            f"the encoder's d_model is {encoder.d_model} and the decoder's {decoder.d_model}; they must be equal",
        )
        require(
            any(layer.cross for layer in decoder.layers),
            "no layer of the decoder has `cross`, so it never sees the source",
        )
        self.encoder, self.decoder = Backbone(encoder), CausalLM(decoder)

    def forward(self, source: Int[Tensor, "b m"], target: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits for the token after each target token, given the whole source."""
        return self.decoder(target, memory=self.encoder(source))
