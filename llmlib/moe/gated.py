"""The experts of nearly every published mixture, SwiGLU without biases, as one op."""

import weakref

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from llmlib.errors import require
from llmlib.ffn import SwiGLU, glu
from llmlib.moe.experts import StackedLinear, as_autocast, busy, expert_linear, sizes_of
from llmlib.ops import Twin, differentiate_again, op, transformed


@op
def expert_swiglu(
    x: Float[Tensor, "m d"],
    gate: Float[Tensor, "E f d"],
    up: Float[Tensor, "E f d"],
    down: Float[Tensor, "E d f"],
    counts: Int[Tensor, "E"],
) -> Float[Tensor, "m d"]:
    """y_i = D_e (silu(G_e x_i) ⊙ U_e x_i), with e the expert of row i: the first counts[0] rows are expert 0's, ….

    The reference sends all rows through one linear map after the other. The twin `by_expert` sends each expert's rows
    through all three, while they and its weights are in the cache. Shazeer, arXiv:2002.05202. ConfigError where the
    shapes or the counts don't fit.
    """
    return expert_linear(glu(expert_linear(x, gate, counts), expert_linear(x, up, counts)), down, counts)


@expert_swiglu.check
def _check(x, gate, up, down, counts) -> None:
    expert_linear.require(x, gate, counts)
    shapes = gate.shape, up.shape, down.mT.shape
    require(
        shapes[0] == shapes[1] == shapes[2],
        f"gate {tuple(gate.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} don't fit together: "
        f"they must be (experts, width, d) twice and (experts, d, width)",
    )


def _by_expert_why_not(x, gate, up, down, counts) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile traces the reference instead"
    if x.device.type != "cpu":
        return f"it is laid out for the caches of a CPU, and x is on {x.device.type}"
    if len({w.dtype for w in (x, gate, up, down)}) > 1:
        return f"x is {x.dtype}, and the weights are {gate.dtype}, {up.dtype}, {down.dtype}"
    return transformed()


@expert_swiglu.twin("by_expert", _by_expert_why_not, measured="two cores of an AMD EPYC, see benchmarks/moe.py")
def _by_expert(x, gate, up, down, counts):
    sizes = sizes_of(counts, len(x))
    if torch.is_grad_enabled():
        return _ByExpert.apply(x, gate, up, down, sizes)
    return _forward(x, gate, up, down, sizes)


def _forward(x, gate, up, down, sizes: list[int], kept: list[Tensor] | None = None) -> Float[Tensor, "m d"]:
    """y; each expert's g and u go into `kept`, which a backward needs."""
    y = x.new_empty(x.shape)
    for e, rows in busy(sizes):
        g, u = _product(x[rows], gate[e]), _product(x[rows], up[e])
        y[rows] = _product(F.silu(g).mul_(u), down[e])
        if kept is not None:
            kept += g, u
    return y


def _one_by_one(twin: Twin) -> None:
    """A kernel of `expert_linear` serves here too, by the reference: it is chosen again at each of the three maps."""
    why_not = lambda x, gate, up, down, counts: twin.why_not(x, gate, counts)  # noqa: E731
    expert_swiglu.twin(twin.name, why_not, auto=twin.name == "grouped_mm", measured=twin.measured)(
        expert_swiglu.reference
    )


for _twin in expert_linear.twins:
    _one_by_one(_twin)


class _ByExpert(torch.autograd.Function):
    """With g = G x, u = U x, h = silu(g) ⊙ u and y = D h:

        ∂h = Dᵀ ∂y     ∂u = silu(g) ⊙ ∂h     ∂g = silu'(g) ⊙ u ⊙ ∂h     ∂x = Gᵀ ∂g + Uᵀ ∂u
        ∂D = ∂y hᵀ     ∂U = ∂u xᵀ            ∂G = ∂g xᵀ

    g and u are kept; h is made again.
    """

    @staticmethod
    def forward(ctx, x, gate, up, down, sizes):
        kept: list[Tensor] = []
        y = _forward(x, gate, up, down, sizes, kept)
        ctx.sizes = sizes
        ctx.save_for_backward(x, gate, up, down, *kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, up, down, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            reference = lambda *inputs: expert_swiglu.reference(*inputs, torch.tensor(ctx.sizes))  # noqa: E731
            return *differentiate_again(reference, (x, gate, up, down), dy), None
        dx = torch.empty_like(x)
        trained = ctx.needs_input_grad[1:4]
        dgate, dup, ddown = (
            _gradient_of(w, ctx.sizes) if needed else None for w, needed in zip((gate, up, down), trained, strict=True)
        )
        for (e, rows), g, u in zip(busy(ctx.sizes), kept[::2], kept[1::2], strict=True):
            open_, dh = F.silu(g), _product(dy[rows], down[e].T)
            _outer(dy[rows], open_ * u, ddown, e)
            du, dg = open_.mul_(dh), torch.ops.aten.silu_backward(dh.mul_(u), g)
            _outer(du, x[rows], dup, e)
            _outer(dg, x[rows], dgate, e)
            torch.add(_product(du, up[e].T), _product(dg, gate[e].T), out=dx[rows])
        return dx, dgate, dup, ddown, None


def _product(x: Float[Tensor, "m i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "m o"]:
    """x Wᵀ, of many rows by oneDNN where it is there: on an AMD processor it is faster than MKL."""
    if len(x) >= 16 and x.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def _outer(dy: Float[Tensor, "m o"], x: Float[Tensor, "m i"], gradient: Float[Tensor, "E o i"] | None, e: int) -> None:
    """∂W_e = ∂yᵀ x, where W is trained."""
    if gradient is not None:
        torch.mm(dy.T, x, out=gradient[e])


_CACHE_LINE = 64  # bytes
_spare = WeakTensorKeyDictionary()  # weight: the memory of its last gradient, once nothing holds that gradient


def _gradient_of(weight: Float[Tensor, "E o i"], sizes: list[int]) -> Float[Tensor, "E o i"]:
    """Memory for a weight's gradient: zero for experts without rows, not yet written for the others.

    A gradient is as large as its weight, and new memory comes from the system page by page, each cleared first:
    much of a training step. So a weight keeps the memory of its last gradient when that is dropped (`zero_grad`), as
    long as the weight itself lives.
    """
    memory = _spare.pop(weight, None)
    if memory is None or memory.nbytes != weight.nbytes:
        memory = np.empty(weight.nbytes + _CACHE_LINE, np.uint8)
        memory = memory[-memory.ctypes.data % _CACHE_LINE :][: weight.nbytes]
    lent = memory[:]  # goes with the gradient, and `memory` stays
    weakref.finalize(lent, _keep, TensorWeakRef(weight), memory).atexit = False
    gradient = torch.frombuffer(lent, dtype=weight.dtype).view(weight.shape)
    for e, size in enumerate(sizes):
        if size == 0:
            gradient[e].zero_()
    return gradient


def _keep(weight: TensorWeakRef, memory: np.ndarray) -> None:
    if (weight := weight()) is not None:
        _spare[weight] = memory


def run_experts(experts: nn.Module, rows: Float[Tensor, "m d"], counts: Int[Tensor, "E"]) -> Float[Tensor, "m d"]:
    """Each row through its own expert; the rows are sorted by expert, `counts` of them for each."""
    if is_plain_swiglu(experts):
        linears = experts.gate_proj, experts.up_proj, experts.down_proj
        return expert_swiglu(*as_autocast(rows, *(linear.weight for linear in linears)), counts)
    experts.shift.counts = counts
    return experts(rows)


def is_plain_swiglu(experts: nn.Module) -> bool:
    """Whether these experts are what `expert_swiglu` computes, and no hook in their maps waits to be called."""
    return type(experts) is SwiGLU and all(
        type(linear) is StackedLinear
        and linear.bias is None
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        for linear in experts.children()
    )
