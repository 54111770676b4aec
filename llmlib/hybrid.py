"""Hybrid mixers: several of them side by side on one input, and one block of weights that many layers share.

Most hybrids need nothing from here: a `ModelConfig` is a tuple of layers, and neighbours may differ.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.context import Context
from llmlib.errors import require, require_state
from llmlib.ffn import ACTIVATIONS, glu
from llmlib.norm import init_linears_


def _part(state: dict | None, name: str) -> dict | None:
    """The state of one part of a mixer, inside the state of the whole."""
    if state is None:
        return None
    return state.setdefault(name, {key: state[key] for key in ("reserve",) if key in state})


class ParallelHeads(nn.Module):
    """Several mixers read one input, and their outputs are added: attention and an SSM in the same layer.

        y = Σ_i output_scales[i] · norm_i(mixer_i(input_scales[i] · x))

    mixers         specs, two or more: mixers=(spec(Attention, num_heads=8), spec(Mamba2, num_heads=16))
    norm           a norm on each output, whose gains set the balance (Hymba, arXiv 2411.13676; with its output_scales
                   of ½, the mean); None adds the outputs as they are (Falcon-H1, arXiv 2507.22448)
    input_scales, output_scales  fixed factors, one for each mixer; None is 1 for all

    Its state: one dict for each mixer, under "0", "1" …
    Raises ConfigError for fewer than two mixers, or factors for another number of them.
    """

    def __init__(
        self,
        d_model: int,
        *,
        mixers: tuple[Callable, ...],
        norm: Callable | None = None,
        input_scales: tuple[float, ...] | None = None,
        output_scales: tuple[float, ...] | None = None,
    ):
        super().__init__()
        require(len(mixers) > 1, f"parallel heads need two mixers or more, and mixers has {len(mixers)}")
        for name, scales in (("input_scales", input_scales), ("output_scales", output_scales)):
            require(
                scales is None or len(scales) == len(mixers),
                f"{name} has {scales and len(scales)} factors for {len(mixers)} mixers: give one for each, or None",
            )
        self.mixers = nn.ModuleList(mixer(d_model) for mixer in mixers)
        self.norms = nn.ModuleList(norm(d_model) for _ in mixers) if norm else None
        self.input_scales, self.output_scales = input_scales, output_scales

    def reset_parameters(self, std: float = 0.02) -> None:
        """Each mixer initialises itself."""
        for mixer in self.mixers:
            mixer.reset_parameters(std=std)

    def forward(
        self, x: Float[Tensor, "b t d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t d"]:
        require_state(state, tuple(map(str, range(len(self.mixers)))), type(self).__name__)
        total = 0
        for i, mixer in enumerate(self.mixers):
            y = mixer(x if self.input_scales is None else self.input_scales[i] * x, _part(state, str(i)), context)
            y = y if self.norms is None else self.norms[i](y)
            total = total + (y if self.output_scales is None else self.output_scales[i] * y)
        return total


class SharedBlock(nn.Module):
    """Zamba's shared transformer: attention, then a gated feed-forward, on [x; embeddings] side by side.

    attention  spec of a mixer over 2 · d_model that ends in d_model: spec(Attention, num_heads=…, d_out=d_model)
    norm       spec of the two norms, over 2 · d_model and over d_model; d_ff, activation  of the feed-forward
    """

    def __init__(self, d_model: int, *, attention: Callable, norm: Callable, d_ff: int, activation: str = "gelu"):
        super().__init__()
        require(activation in ACTIVATIONS, f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        self.input_norm, self.attention, self.ffn_norm = norm(2 * d_model), attention(2 * d_model), norm(d_model)
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.activation = activation

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²); the attention initialises itself."""
        init_linears_(self, std)
        self.attention.reset_parameters(std=std)

    def forward(self, x: Float[Tensor, "b t d"], state, context: Context, use: "WithSharedBlock"):
        y = self.input_norm(torch.cat((x, context.embeddings), -1))
        y = torch.func.functional_call(self.attention, use.adapted(self.attention), (y, state, context))
        y, adapter = self.ffn_norm(y), use.adapter
        gate, up = (self.gate_up_proj(y) if adapter is None else self.gate_up_proj(y) + adapter(y)).chunk(2, -1)
        return self.down_proj(glu(gate, up, self.activation))


class WithSharedBlock(nn.Module):
    """Zamba2's hybrid layer (arXiv 2411.15242): mixer(norm(x + linear(block(x, embeddings)))).

    The block's weights belong to the first layer that names it and are found there by the others; what differs from
    use to use is `linear`, a low-rank adapter on the feed-forward, and the mixer after it. The norm is in here, since
    the block reads x before it: give the layer norm=spec(Identity).

    name          of the shared block: layers with the same name share it
    block         spec(SharedBlock, …) in the first layer of that name, None in the later ones
    mixer, norm   what follows, and the norm before it
    d_ff, adapter_rank  of the block's feed-forward, for this use's adapter; rank 0 leaves it out
    attention_adapter   adapters of that rank on the block's q_proj, k_proj and v_proj too: W + B A in place of W

    Its state: one dict for the block's attention, "block", and one for the mixer, "mixer".
    Raises ConfigError where adapters and block don't fit, or no layer or two give the block its weights; ValueError
    outside a model.
    """

    def __init__(
        self,
        d_model: int,
        *,
        name: str,
        mixer: Callable,
        norm: Callable,
        block: Callable | None = None,
        d_ff: int = 0,
        adapter_rank: int = 0,
        attention_adapter: bool = False,
    ):
        super().__init__()
        require(
            adapter_rank == 0 or d_ff > 0,
            f"adapter_rank is {adapter_rank}, so d_ff, the width of the block's feed-forward, must be given",
        )
        self.name, self.block = name, block and block(d_model)
        require(
            adapter_rank > 0 or not attention_adapter,
            f"attention_adapter needs a rank, and adapter_rank is {adapter_rank}: give it 1 or more",
        )
        self.adapter = _low_rank(d_model, adapter_rank, 2 * d_ff) if adapter_rank else None
        names = ("q_proj", "k_proj", "v_proj") if attention_adapter else ()
        self.attention_adapters = nn.ModuleDict({n: _low_rank(2 * d_model, adapter_rank, 2 * d_model) for n in names})
        self.linear = nn.Linear(d_model, d_model, bias=False)
        self.norm, self.mixer = norm(d_model), mixer(d_model)
        self._reset_own(0.02)

    def _reset_own(self, std: float) -> None:
        for part in (self.linear, self.adapter, self.attention_adapters):
            if part is not None:
                init_linears_(part, std)

    def adapted(self, attention: nn.Module) -> dict[str, Tensor]:
        """The weights of the block's attention that this use changes."""
        return {
            f"{name}.weight": getattr(attention, name).weight + adapter[1].weight @ adapter[0].weight
            for name, adapter in self.attention_adapters.items()
        }

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²); the mixer and the block, where it lives here, initialise themselves."""
        self._reset_own(std)
        self.mixer.reset_parameters(std=std)
        if self.block is not None:
            self.block.reset_parameters(std=std)

    def forward(
        self, x: Float[Tensor, "b t d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t d"]:
        require(
            context is not None and context.embeddings is not None,
            "a shared block reads context.embeddings: call it inside a model",
            ValueError,
        )
        require_state(state, ("block", "mixer"), type(self).__name__)
        blocks = context.shared.setdefault("blocks", {})
        if self.block is not None:
            require(
                blocks.setdefault(self.name, self.block) is self.block,
                f"two layers give the shared block {self.name!r} weights: give block= in the first of that name only",
            )
        require(
            self.name in blocks,
            f"no layer before this one has the shared block {self.name!r}: "
            f"give the first of that name block=spec(SharedBlock, …)",
        )
        self._require_fit(blocks[self.name])
        y = self.linear(blocks[self.name](x, _part(state, "block"), context, self))
        return self.mixer(self.norm(x + y), _part(state, "mixer"), context)

    def _require_fit(self, block: SharedBlock) -> None:
        """Raises ConfigError where an adapter has another width than what it changes."""
        if self.adapter is not None:
            mine, its = self.adapter[1].out_features // 2, block.gate_up_proj.out_features // 2
            require(mine == its, f"d_ff is {mine}, and that of the shared block {self.name!r} is {its}: give the same")
        for name, adapter in self.attention_adapters.items():
            mine, its = adapter[1].out_features, getattr(block.attention, name).out_features
            require(
                mine == its,
                f"attention_adapter changes a {name} as wide as its input, {mine}, and that of the shared block "
                f"{self.name!r} is {its} wide: give its attention heads of that width in all, and no groups",
            )


def _low_rank(d_in: int, rank: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False))


class Identity(nn.Identity):
    """No norm: for layers whose mixer has its own inside."""

    def __init__(self, dim: int):
        super().__init__()
