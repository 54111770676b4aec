"""One switch between readable references and fused kernels.

An op is its readable reference plus optional twins, each named after its provider and listed best first:

    @op
    def attention(q, k, v): ...                 # the equation, in PyTorch, on any device

    @attention.twin("sdpa", why_not)            # why_not(q, k, v) is None, or the reason it refuses these inputs
    def sdpa(q, k, v): ...

`kernels("auto")`, the default, takes the first twin that accepts the inputs and the reference when none does.
The environment variable `LLMLIB_KERNELS` sets the mode that a process starts with.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from llmlib.errors import KernelUnavailableError

OPS: dict[str, "Op"] = {}
MODES = ("auto", "reference", "fused")
_OP_MODULES = ("norm", "position", "attention", "ffn", "ssm", "moe", "model")
_found: dict[str, bool] = {}
_mode = os.environ.get("LLMLIB_KERNELS", "auto")
_log: "list[Choice] | None" = None
_meter: Callable | None = None


def available(module: str) -> bool:
    """Whether `module` can be imported here; found by a look at the path, without importing it."""
    if module not in _found:
        _found[module] = importlib.util.find_spec(module) is not None
    return _found[module]


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes as long as torch's.
available._dynamo_marked_constant = True


@dataclass(frozen=True)
class Twin:
    """A faster way to compute an op: `run` equals the reference wherever `why_not` returns None."""

    name: str
    run: Callable
    why_not: Callable[..., str | None]
    auto: bool = True
    measured: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.measured else f"{self.name} (unmeasured)"


@dataclass(frozen=True)
class Choice:
    """Which kernel ran for one call of an op, and why each twin that ranks before it didn't."""

    op: str
    kernel: str
    refused: tuple[tuple[str, str], ...] = ()


class Op:
    """A function with one readable reference and any number of fused twins behind the same signature."""

    def __init__(self, reference: Callable):
        functools.update_wrapper(self, reference)
        self.name, self.reference, self.twins = reference.__name__, reference, []
        self.require: Callable | None = None
        OPS[self.name] = self

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join([t.name for t in self.twins] + ['reference'])}>"

    def twin(self, name: str, why_not: Callable[..., str | None], *, auto: bool = True, measured: str | None = None):
        """Register the decorated function as a twin called `name`.

        auto=False keeps it for those who ask for it by name (a twin that teaches rather than speeds up);
        `measured` says on what machine its advantage was seen, and without it `explain` marks it as unmeasured.
        """

        def register(run: Callable) -> Callable:
            self.twins.append(Twin(name, run, why_not, auto, measured))
            return run

        return register

    def check(self, function: Callable) -> Callable:
        """Register the decorated function to run first, with the same arguments: it raises where they don't fit."""
        self.require = function
        return function

    def __call__(self, *args, **kwargs):
        if self.require is not None:
            self.require(*args, **kwargs)
        if _meter is not None:
            return _meter(self, args, kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args, **kwargs):
        """Compute by the kernel that the current mode chooses."""
        twin = self.choose(*args, **kwargs)
        if _log is not None:
            _log.append(self.explain(*args, **kwargs))
        return self.reference(*args, **kwargs) if twin is None else twin.run(*args, **kwargs)

    def choose(self, *args, **kwargs) -> Twin | None:
        """The twin that the current mode takes for these inputs, or None for the reference."""
        if _mode == "reference":
            return None
        if _mode not in MODES and not any(t.name == _mode for t in self.twins):
            _require_known(_mode)
            return self._first_willing(args, kwargs)
        if _mode == "auto":
            return self._first_willing(args, kwargs)
        candidates = [t for t in self.twins if (t.auto if _mode == "fused" else t.name == _mode)]
        refusals = []
        for twin in candidates:
            reason = twin.why_not(*args, **kwargs)
            if reason is None:
                return twin
            refusals.append(f"{twin.name}: {reason}")
        if refusals:
            raise KernelUnavailableError(
                f"kernels({_mode!r}) was asked for, but {self.name} can't run it on these inputs: "
                f"{'; '.join(refusals)}. "
                f'Change the inputs so, or use kernels("auto"), which falls back to the reference.'
            )
        return None

    def _first_willing(self, args, kwargs) -> Twin | None:
        for twin in self.twins:
            if twin.auto and twin.why_not(*args, **kwargs) is None:
                return twin
        return None

    def explain(self, *args, **kwargs) -> Choice:
        """Which kernel these inputs get in the current mode, and why the others don't."""
        chosen = self.choose(*args, **kwargs)
        refused = []
        for twin in self.twins:
            if twin is chosen:
                break
            refused.append((twin.label, _reason(twin, args, kwargs)))
        return Choice(self.name, "reference" if chosen is None else chosen.label, tuple(refused))


def _reason(twin: Twin, args, kwargs) -> str:
    if _mode == "reference":
        return 'kernels("reference") is set'
    reason = twin.why_not(*args, **kwargs)
    if reason is not None:
        return reason
    return "runs only when asked for by name" if not twin.auto else f"kernels({_mode!r}) is set"


def op(reference: Callable) -> Op:
    """Make `reference`, a readable PyTorch function, an op that fused twins can join."""
    return Op(reference)


def kernel_names() -> list[str]:
    """Every name that `kernels` accepts: the three modes and the twins of all ops."""
    for module in _OP_MODULES:
        if importlib.util.find_spec(f"llmlib.{module}"):
            importlib.import_module(f"llmlib.{module}")
    return [*MODES, *sorted({t.name for o in OPS.values() for t in o.twins})]


def _require_known(mode: str) -> None:
    names = kernel_names()
    if mode not in names:
        raise KernelUnavailableError(f"no op has a kernel called {mode!r}; choose one of {', '.join(names)}")


def differentiate_again(function, inputs, gradients):
    """The gradients of `function(*inputs)` for the output's `gradients`, as a graph that can be differentiated in turn.

    For the backward of a hand-written kernel while torch.is_grad_enabled(), which create_graph=True brings about:
    `function` is the readable reference. Returns a list, with None for each input that needs no gradient.
    """
    needed = [isinstance(x, torch.Tensor) and x.requires_grad for x in inputs]
    with torch.enable_grad():
        # views, for an input that was computed from another one would carry gradient into it
        inputs = [x.view_as(x) if wanted else x for x, wanted in zip(inputs, needed, strict=True)]
        outputs = function(*inputs)
        pairs = [(outputs, gradients)] if isinstance(outputs, torch.Tensor) else zip(outputs, gradients, strict=True)
        # not every output needs a gradient: a scan's last state doesn't, when only what reads the states does
        outputs, gradients = zip(*((y, dy) for y, dy in pairs if y.requires_grad), strict=True)
        wanted = [x for x, wanted in zip(inputs, needed, strict=True) if wanted]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(found) if wanted else None for wanted in needed]


def transformed() -> str | None:
    """The reason why a hand-written backward can't run inside torch.func.grad, vmap and their like."""
    active = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return "torch.func can't transform it" if active else None


@contextlib.contextmanager
def kernels(mode: str = "auto") -> Iterator[None]:
    """Choose the kernels inside a `with` block.

    "auto" takes the best twin that supports the inputs, "reference" the readable PyTorch, "fused" any twin but never
    the reference where an op has twins, and a provider's name ("sdpa", "mamba-ssm", …) that twin wherever an op has it.
    A forced kernel that can't run raises `KernelUnavailableError` with the reason; so does a name that no op knows.
    """
    global _mode
    if mode not in MODES:
        _require_known(mode)
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


@contextlib.contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect a `Choice` for each op that runs inside the block."""
    global _log
    before, _log = _log, []
    try:
        yield _log
    finally:
        _log = before


@contextlib.contextmanager
def metered(meter: Callable) -> Iterator[None]:
    """Hand each op's call to `meter(op, args, kwargs)` inside the block; it computes by `op.run` when it is done."""
    global _meter
    before, _meter = _meter, meter
    try:
        yield
    finally:
        _meter = before


@dataclass
class Explanation:
    """What `explain` found: one line for each op and kernel, with how often it ran."""

    choices: list[Choice]
    counts: dict[Choice, int] = field(init=False)

    def __post_init__(self):
        self.counts = {c: self.choices.count(c) for c in dict.fromkeys(self.choices)}

    def __str__(self) -> str:
        lines = []
        for choice, count in self.counts.items():
            times = f"  × {count}" if count > 1 else ""
            lines.append(f"{choice.op}: {choice.kernel}{times}")
            lines += [f"    not {name}: {reason}" for name, reason in choice.refused]
        return "\n".join(lines) or "no op ran"

    def _ipython_display_(self) -> None:
        """`explain` has printed it already."""


def explain(target, *inputs, **options) -> Explanation:
    """Print, op by op, which kernel runs for these inputs and why the others don't.

    target  an op (nothing is computed), or a module or function, which is run once on `inputs` without gradients
    """
    if isinstance(target, Op):
        choices = [target.explain(*inputs, **options)]
    else:
        with torch.no_grad(), record() as choices:
            target(*inputs, **options)
    explanation = Explanation(choices)
    print(explanation)
    return explanation
