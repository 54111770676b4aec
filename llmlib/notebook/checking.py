"""`check`: the reader's ten lines against the library."""

from collections.abc import Callable

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check(mine: Callable | Tensor, theirs: Callable | Tensor, *inputs, tol: float | None = None,
          **options) -> None:  # fmt: skip
    """Compare two functions on the same inputs, outputs and gradients, and print one line; or compare two tensors.

    The gradients are those of a fixed random projection of the outputs, with respect to every floating input.
    options are given to both functions. Raises AssertionError that says what differs, where and by how much.
    """
    if isinstance(mine, Tensor):
        tol = tol or _TOLERANCE.get(mine.dtype, 0.0)
        _compare(mine, theirs, tol, "the value")
        print(f"✓ equal to {tol:g}")
        return
    ours, our_inputs = _run(mine, inputs, options)
    wanted, their_inputs = _run(theirs, inputs, options)
    tol = tol or _TOLERANCE.get(wanted[0].dtype, 0.0)
    assert len(ours) == len(wanted), f"{_name(mine)} returns {len(ours)} tensors, {_name(theirs)} returns {len(wanted)}"
    for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        _compare(a, b, tol, "the output" if len(ours) == 1 else f"output {i}")
    compared = any(b.requires_grad for b in wanted)
    if compared:
        _compare_gradients(ours, wanted, our_inputs, their_inputs, tol)
    what = "outputs and gradients" if compared else "outputs"
    print(f"✓ {_name(mine)} = {_name(theirs)}: {what} agree to {tol:g}")


def _name(function) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


def _run(function, inputs, options) -> tuple[list[Tensor], list]:
    def fresh(x):
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().clone().requires_grad_() if floating else x

    inputs = [fresh(x) for x in inputs]
    out = function(*inputs, **options)
    assert out is not None, f"{_name(function)} returned nothing: is the `return` missing?"
    return (list(out) if isinstance(out, tuple | list) else [out]), inputs


def _compare_gradients(ours, wanted, our_inputs, their_inputs, tol) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(b.shape, generator=generator, dtype=torch.float64).to(b) for b in wanted]
    for outputs, whose in ((ours, "yours"), (wanted, "the library's")):
        assert any(o.requires_grad for o in outputs), f"no gradient flows through {whose}: is something detached?"
        sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    for i, (a, b) in enumerate(zip(our_inputs, their_inputs, strict=True)):
        if isinstance(b, Tensor) and b.grad is not None:
            assert a.grad is not None, f"the gradient with respect to input {i} doesn't arrive"
            _compare(a.grad, b.grad, tol * 10, f"the gradient with respect to input {i}")


def _compare(mine: Tensor, theirs: Tensor, tol: float, what: str) -> None:
    assert isinstance(mine, Tensor), f"{what} should be a tensor, not {type(mine).__name__}"
    assert mine.shape == theirs.shape, f"{what} has shape {tuple(mine.shape)}, but should have {tuple(theirs.shape)}"
    assert mine.dtype == theirs.dtype, f"{what} has dtype {mine.dtype}, but should have {theirs.dtype}"
    mine, theirs = mine.detach(), theirs.detach()
    if torch.allclose(mine.double(), theirs.double(), rtol=tol, atol=tol, equal_nan=True):
        return
    wrong = ~torch.isclose(mine.double(), theirs.double(), rtol=tol, atol=tol, equal_nan=True)
    at = tuple(wrong.nonzero()[0].tolist())
    raise AssertionError(
        f"{what} differs in {int(wrong.sum())} of {wrong.numel()} places; the first is {at}: "
        f"{mine[at].item():.6g} where {theirs[at].item():.6g} is right.{_factor(mine, theirs)}"
    )


def _factor(mine: Tensor, theirs: Tensor) -> str:
    """A hint for the commonest mistake, a forgotten scale."""
    use = theirs.double().abs() > 1e-6
    ratio = mine.double()[use] / theirs.double()[use]
    if ratio.numel() > 1 and ratio.isfinite().all() and ratio.std() < 1e-3 * ratio.mean().abs():
        return f" Yours is {ratio.mean():.4g} times the right one everywhere: look for a scale or a sign."
    return " It is not a number: look for 0/0 or −∞ − (−∞)." if mine.isnan().any() else ""
