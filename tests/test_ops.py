"""Every op: each twin equals the readable reference, outputs and gradients, in every dtype; and it compiles."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmlib.ops import OPS, kernel_names

kernel_names()  # imports every module that registers ops
# how far a twin may be from the reference, as a share of the reference's largest number: outputs, gradients
TOLERANCE = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-5, 1e-4),
    torch.float16: (5e-3, 2e-2),
    torch.bfloat16: (3e-2, 6e-2),
}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def load_examples() -> dict[str, list]:
    examples = {}
    for path in sorted((Path(__file__).parent / "op_examples").glob("*.py")):
        module_spec = importlib.util.spec_from_file_location(f"op_examples_{path.stem}", path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        assert not module.EXAMPLES.keys() & examples.keys(), f"{path.name} repeats the examples of another file"
        examples |= module.EXAMPLES
    return examples


EXAMPLES = load_examples()
PAIRS = [(op.name, twin.name) for op in OPS.values() for twin in op.twins]


def leaves(args, kwargs):
    """Copies whose floating-point tensors ask for gradients: a twin may refuse inputs that don't."""

    def leaf(x):
        return x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tuple(map(leaf, args)), {name: leaf(x) for name, x in kwargs.items()}


def run(function, args, kwargs):
    """Outputs and the gradients of a fixed weighted sum of them with respect to every floating-point input."""
    args, kwargs = leaves(args, kwargs)
    flat = [*args, *kwargs.values()]
    y = function(*args, **kwargs)
    outputs = [x for x in (y if isinstance(y, tuple | list) else [y]) if isinstance(x, torch.Tensor)]
    generator = torch.Generator().manual_seed(2**20)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in outputs)
    inputs = [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]
    return outputs, torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_all_close(name, got, want, tolerance):
    """The same types and shapes, and numbers that differ by less than a share of the largest in all of them."""
    largest = max(x.double().abs().max() for x in want if x is not None)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), f"{name} {i} exists only once"
        if b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, f"{name} {i}"
            assert torch.isfinite(a).all() and torch.isfinite(b).all(), f"{name} {i} isn't finite"
            error = (a.double() - b.double()).abs().max() / largest
            assert error <= tolerance, f"{name} {i} is off by {error:.1e} of the largest number"


def test_every_op_has_an_example():
    without = [op for op in OPS if not EXAMPLES.get(op)]
    assert not without, f"no examples in tests/op_examples for {without}"
    assert not EXAMPLES.keys() - OPS.keys(), f"examples of ops that don't exist: {EXAMPLES.keys() - OPS.keys()}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "twin"), PAIRS, ids=lambda name: name)
def test_a_twin_equals_its_reference(op, twin, dtype, device):
    op = OPS[op]
    twin = next(t for t in op.twins if t.name == twin)
    reasons, compared = [], 0
    for i, example in enumerate(EXAMPLES.get(op.name, [])):
        torch.manual_seed(i)
        args, kwargs = leaves(*example(dtype, device))
        if reason := twin.why_not(*args, **kwargs):
            reasons.append(reason)
            continue
        got, want = (run(f, args, kwargs) for f in (twin.run, op.reference))
        assert_all_close(f"example {i}, output", got[0], want[0], TOLERANCE[dtype][0])
        assert_all_close(f"example {i}, gradient", got[1], want[1], TOLERANCE[dtype][1])
        compared += 1
    if not compared:
        pytest.skip(f"{twin.name} refuses all examples here: {'; '.join(sorted(set(reasons)))}")


@pytest.mark.parametrize("op", EXAMPLES)
def test_a_reference_invents_no_type(op):
    """It computes in float32 where it must, and returns a type that its inputs have, or float32."""
    for dtype in (torch.float64, torch.bfloat16):
        for example in EXAMPLES[op]:
            args, kwargs = example(dtype, "cpu")
            y = OPS[op].reference(*args, **kwargs)
            known = {x.dtype for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)} | {torch.float32}
            assert (y[0] if isinstance(y, tuple | list) else y).dtype in known


def test_ops_compile_without_a_graph_break():
    """In a process of its own: the checks of shape annotations that tests install can't be traced."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.split() == list(EXAMPLES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, examples in EXAMPLES.items():
        torch._dynamo.reset()  # all ops share one code object, whose graphs would reach the limit
        args, kwargs = examples[0](torch.float32, "cpu")
        compiled = torch.compile(OPS[name], fullgraph=True, backend="eager")
        for got, want in zip(run(compiled, args, kwargs), run(OPS[name], args, kwargs), strict=True):
            assert_all_close(f"{name}, compiled", got, want, 1e-5)
        print(name)
