"""Experts: one feed-forward whose linear maps hold a matrix for each expert."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlib.errors import ConfigError, require
from llmlib.moe.routing import autocast_dtype, expert_of_rows
from llmlib.ops import differentiate_again, op, transformed


@op
def expert_linear(
    x: Float[Tensor, "m d"],
    weight: Float[Tensor, "E f d"],
    counts: Int[Tensor, "E"],
    bias: Float[Tensor, "E f"] | None = None,
) -> Float[Tensor, "m f"]:
    """y_i = W_e x_i + b_e, with e the expert of row i: the first counts[0] rows are expert 0's, the next expert 1's, ….

    The reference goes from expert to expert. The twins: a product for each expert, written in place (segments), one
    kernel for all (grouped_mm, MegaBlocks' idea, arXiv:2211.15841), and every expert on every row under a mask (dense).
    Raises ConfigError where shapes don't fit, and off the GPU where the counts aren't ≥ 0 or don't sum to m.
    """
    biases = len(weight) * [None] if bias is None else bias.unbind()
    segments = zip(x.split(sizes_of(counts, len(x))), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(rows, W, b) for rows, W, b in segments])


@expert_linear.check
def _check(x, weight, counts, bias=None) -> None:  # noqa: ARG001
    if counts.shape[0] == weight.shape[0] and x.shape[-1] == weight.shape[-1]:
        return
    require(
        len(counts) == len(weight),
        f"counts has {len(counts)} entries for the {len(weight)} experts of weight {tuple(weight.shape)}",
    )
    require(
        x.shape[-1] == weight.shape[-1],
        f"x has rows of {x.shape[-1]}, and weight {tuple(weight.shape)} takes rows of {weight.shape[-1]}",
    )


def sizes_of(counts: Int[Tensor, "E"], rows: int) -> list[int]:
    """The counts as numbers, checked; on the meta device, where nothing has a value, an even split."""
    if not counts.is_meta:
        sizes = counts.tolist()
        if sum(sizes) != rows or min(sizes) < 0:
            raise ConfigError(f"counts must be 0 or more and sum to the {rows} rows of x: {sizes} sum to {sum(sizes)}")
        return sizes
    return [rows // len(counts) + (e < rows % len(counts)) for e in range(len(counts))]


def _segments_why_not(x, weight, counts, bias=None) -> str | None:
    if x.is_cuda and _grouped_mm_why_not(x, weight, counts, bias) is None:
        return "it waits for the GPU to learn the counts, and grouped_mm doesn't"
    return transformed()


@expert_linear.twin("segments", _segments_why_not, measured="two cores of an AMD EPYC, see benchmarks/moe.py")
def _segments(x, weight, counts, bias=None):
    if torch.compiler.is_compiling():
        return _opaque_segments(x, weight, counts, bias)
    sizes = sizes_of(counts, x.shape[0])
    return _Segments.apply(x, weight, bias, sizes) if torch.is_grad_enabled() else _multiply(x, weight, bias, sizes)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    for e, rows in busy(sizes):
        if bias is None:
            torch.mm(x[rows], weight[e].T, out=y[rows])
        else:
            torch.addmm(bias[e], x[rows], weight[e].T, out=y[rows])
    return y


def _differentiate(dy: Tensor, x: Tensor, weight: Tensor, sizes: list[int], needed) -> list[Tensor | None]:
    """The gradients of x, weight and bias, as far as `needed`."""
    shapes = x.shape, weight.shape, weight.shape[:2]
    dx, dW, db = (x.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, needed, strict=True))
    for e, rows in busy(sizes):
        if dx is not None:
            torch.mm(dy[rows], weight[e], out=dx[rows])
        if dW is not None:
            torch.mm(dy[rows].T, x[rows], out=dW[e])
        if db is not None:
            torch.sum(dy[rows], dim=0, out=db[e])
    for e, size in enumerate(sizes):
        for gradient in (dW, db):
            if size == 0 and gradient is not None:
                gradient[e].zero_()
    return [dx, dW, db]


class _Segments(torch.autograd.Function):
    """Autograd would return each expert's gradient apart and then stack them; here each is written where it belongs."""

    @staticmethod
    def forward(ctx, x, weight, bias, sizes):
        ctx.save_for_backward(x, weight, bias)
        ctx.sizes = sizes
        return _multiply(x, weight, bias, sizes)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            counts = torch.tensor(ctx.sizes)
            reference = lambda x, weight, bias: expert_linear.reference(x, weight, counts, bias)  # noqa: E731
            return *differentiate_again(reference, (x, weight, bias), dy), None
        return *_differentiate(dy, x, weight, ctx.sizes, ctx.needs_input_grad[:3]), None


@torch.library.custom_op("llmlib::expert_linear", mutates_args=())
def _opaque_segments(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """The same for torch.compile, which can't look inside: the sizes are read from a tensor."""
    return _multiply(x, weight, bias, sizes_of(counts, len(x)))


@torch.library.custom_op("llmlib::expert_linear_backward", mutates_args=())
def _opaque_backward(dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> list[Tensor]:
    return _differentiate(dy, x, weight, counts.tolist(), (True, True, True))


@_opaque_segments.register_fake
def _(x, weight, counts, bias):  # noqa: ARG001
    return x.new_empty(len(x), weight.shape[1])


@_opaque_backward.register_fake
def _(dy, x, weight, counts):  # noqa: ARG001
    return [torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[:2])]


def _save(ctx, inputs, output) -> None:
    x, weight, counts, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, counts)


def _backward(ctx, dy):
    dx, dW, db = _opaque_backward(dy, *ctx.saved_tensors)
    return dx, dW, None, db if ctx.has_bias else None


_opaque_segments.register_autograd(_backward, setup_context=_save)


def busy(sizes: list[int]):
    """Each expert that has rows, with their slice."""
    start = 0
    for e, size in enumerate(sizes):
        if size:
            yield e, slice(start, start + size)
            start += size


def _grouped_mm_why_not(x, weight, counts, bias=None) -> str | None:  # noqa: ARG001
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return "torch.compile takes it in bfloat16 only"
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no F.grouped_mm; it came with 2.10"
    if transformed():
        return transformed()
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no {str(x.dtype).removeprefix('torch.')}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"it needs a GPU of compute capability 8.0, and this has {torch.cuda.get_device_capability(x.device)}"
    if any(size * x.element_size() % 16 for size in weight.shape[1:]):
        return f"rows must be multiples of 16 bytes, and weight is {tuple(weight.shape)}"
    return None if x.numel() else "there are no rows"


@expert_linear.twin("grouped_mm", _grouped_mm_why_not, measured="two cores of an AMD EPYC, see benchmarks/moe.py")
def _grouped_mm(x, weight, counts, bias=None):
    if not x.is_cuda and not torch.compiler.is_compiling():
        sizes_of(counts, len(x))  # a check, which on a GPU would have to wait for the counts
    y = F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
    y = _ContiguousGradient.apply(y)
    return y if bias is None else y + bias[expert_of_rows(counts, len(x))]


class _ContiguousGradient(torch.autograd.Function):
    """grouped_mm's backward refuses an expanded gradient, such as that of a sum."""

    @staticmethod
    def forward(_ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(_ctx, gradient):
        return gradient.contiguous()


@expert_linear.twin("dense", lambda *_, **__: None, auto=False)
def _dense(x, weight, counts, bias=None):
    every = torch.einsum("md,efd->mef", x, weight)
    if bias is not None:
        every = every + bias
    mine = F.one_hot(expert_of_rows(counts, len(x)), len(weight)).to(every.dtype)
    return torch.einsum("mef,me->mf", every, mine)


class Shift:
    """Whose the rows are that the linear maps of a stack are about to see: `counts` (E) of them for each expert."""

    counts: Tensor | None = None


class StackedLinear(nn.Linear):
    """num_experts linear maps of one shape as one parameter, weight (E f d); all maps of a stack share a `Shift`."""

    undecayed = ("bias",)

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool, shift: Shift):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self.shift = shift

    def extra_repr(self) -> str:
        return f"{len(self.weight)} × ({self.in_features} → {self.out_features}), bias={self.bias is not None}"

    def forward(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m f"]:
        x, weight, bias = as_autocast(x, self.weight, self.bias)
        return expert_linear(x, weight, self.shift.counts, bias)


def as_autocast(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Inputs in the dtype that autocast gives to a linear map: neither grouped_mm nor an `out=` product asks it."""
    dtype = autocast_dtype(x)
    return [p if dtype is None or p is None else p.to(dtype) for p in (x, *parameters)]


def stack_experts(expert: Callable[[int], nn.Module], d_model: int, num_experts: int) -> nn.Module:
    """`num_experts` of the feed-forward that `expert(d_model)` builds, as one module of the same class.

    Its linear maps become `StackedLinear`; everything else in it works row by row, and so serves all experts alike.
    Raises ConfigError when it holds a parameter outside its linear maps.
    """
    with torch.device("meta"):
        experts = expert(d_model)
    experts.shift = Shift()
    for parent in list(experts.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                sizes = num_experts, child.in_features, child.out_features
                setattr(parent, name, StackedLinear(*sizes, child.bias is not None, experts.shift))
    stacked = {id(p) for m in experts.modules() if isinstance(m, StackedLinear) for p in m.parameters()}
    left = [name for name, p in experts.named_parameters() if id(p) not in stacked]
    require(
        not left,
        f"{type(experts).__name__} can't be an expert: {', '.join(left)} is in no linear map, so it can't be stacked",
    )
    experts.reset_parameters()
    return experts
