"""Runs the Triton twins of llmlib.ssm where there is no GPU: by Triton's interpreter, or as far as machine code.

    python tests/triton_without_gpu.py interpret ssd mamba-ssm     outputs and gradients beside the reference's
    python tests/triton_without_gpu.py compile 90 ssd mamba-ssm    every kernel it launches, compiled for sm_90
    python tests/triton_without_gpu.py references                  mamba-ssm's own CPU functions beside ours

Prints one JSON line: for each number compared its error as a share of the largest, or the kernels' sizes in bytes.
Needs triton ≥ 3.9, and mamba_ssm or fla; their compiled extensions aren't needed.
"""

import builtins
import contextlib
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import sys
import types
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
if sys.argv[1] != "compile":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402, F401
import triton.language as tl  # noqa: E402
from triton.runtime import autotuner, driver, interpreter, jit  # noqa: E402

torch.set_num_threads(1)
SMALL = {  # as small as the kernels' blocks allow
    "ssd": lambda ex: [ex.ssd(t=17, h=2, g=1), ex.ssd(t=20, h=2, g=2, with_state=True, with_D=False)],
    "state_update": lambda ex: [ex.update_of_mamba, ex.update_of_mamba2],
    "causal_conv": lambda ex: [ex.conv(), ex.conv(with_history=True, with_bias=False)],
    "gated_delta_rule": lambda ex: [ex.delta(t=17, h=1), ex.delta(t=20, h=1, with_state=True)],
    "mamba3_scan": lambda ex: [ex.mamba3(t=21, h=2, g=1), ex.mamba3(t=17, h=2, g=2, with_state=True)],
}


def examples():
    path = Path(__file__).parent / "op_examples" / "ssm.py"
    module_spec = importlib.util.spec_from_file_location("op_examples_ssm", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def pretend_gpu(major: int, minor: int) -> None:
    """What the packages ask of a GPU before they launch; mamba_ssm's own __init__ asks for its extension too."""
    properties = types.SimpleNamespace(
        multi_processor_count=4, major=major, minor=minor, name="none", total_memory=8e10
    )
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: (major, minor)
    torch.cuda.current_device = lambda: 0
    torch.Tensor.is_cuda = property(lambda _: True)
    found = importlib.util.find_spec("mamba_ssm")
    if found is not None:
        package = types.ModuleType("mamba_ssm")
        package.__path__, package.__spec__ = list(found.submodule_search_locations), found
        sys.modules["mamba_ssm"] = package
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    sys.modules["selective_scan_cuda"].__spec__ = importlib.machinery.ModuleSpec("selective_scan_cuda", None)


def smallest_config(self, *args, **kwargs):
    """An autotuner that doesn't time: it takes the config with the smallest blocks."""
    size = lambda config: math.prod(v for k, v in config.kwargs.items() if k.startswith(("BLOCK", "B")))  # noqa: E731
    self.best_config = min(self.configs, key=size)
    if self.best_config.pre_hook is not None:
        self.best_config.pre_hook(
            {**dict(zip(self.arg_names, args, strict=False)), **kwargs, **self.best_config.kwargs}
        )
    return self.fn.run(*args, **{**kwargs, **self.best_config.all_kwargs()})


class Answer:
    def __init__(self, handle):
        self.handle = handle

    def get_result(self, _):
        return self.handle


def inline_asm(self, code, constraints, values, types_, pure, pack):
    """The three instructions that Mamba-3 writes in PTX."""
    function = {"cos": np.cos, "sin": np.sin, "tanh": np.tanh}[code.split(".")[0]]
    return Answer(interpreter.TensorHandle(function(values[0].data).astype(np.float32), tl.float32))


class Index(int):
    def to(self, dtype):
        return self


class Float32Torch:
    """torch, with float32 in the place of bfloat16, which the interpreter gets wrong."""

    def __getattr__(self, name):
        return torch.float32 if name == "bfloat16" else getattr(torch, name)


def prepare_interpreter(op: str, provider: str) -> None:
    interpreter.InterpreterBuilder.create_inline_asm = inline_asm
    if provider == "fla":
        for name in ("chunk_h", "chunk_o", "chunk_delta_h"):  # loop indices that know `.to`, as compiled ones do
            module = importlib.import_module(f"fla.ops.common.{name}")
            module.range = lambda *bounds: map(Index, builtins.range(*bounds))
    if op == "mamba3_scan":
        for name in ("combined", "fwd"):
            importlib.import_module(f"mamba_ssm.ops.triton.mamba3.mamba3_siso_{name}").torch = Float32Torch()


def outputs_and_gradients(function, args, kwargs, gradients):
    flat = [*args, *kwargs.values()]
    flat = [x.clone() if isinstance(x, torch.Tensor) else x for x in flat]
    inputs = [x.requires_grad_(gradients) for x in flat if isinstance(x, torch.Tensor)]
    y = function(*flat[: len(args)], **dict(zip(kwargs, flat[len(args) :], strict=True)))
    outputs = [y] if isinstance(y, torch.Tensor) else [y[0], *(y[1] if isinstance(y[1], tuple) else y[1:])]
    if not gradients:
        return outputs
    generator = torch.Generator().manual_seed(0)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def has_gradients(op: str, kwargs: dict) -> bool:
    """One has no backward, and the interpreter stumbles over the gradient of a convolution's history."""
    return op != "state_update" and "history" not in kwargs


def error(a, b) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3)).item()


def the_twin(op: str, provider: str):
    from llmlib.ops import OPS, kernel_names

    kernel_names()
    return OPS[op], next(twin for twin in OPS[op].twins if twin.name == provider)


def interpret(op: str, provider: str) -> list[float]:
    autotuner.Autotuner.run = smallest_config
    pretend_gpu(9, 0)
    prepare_interpreter(op, provider)
    reference, twin = the_twin(op, provider)
    errors = []
    for example in SMALL[op](examples()):
        args, kwargs = example(torch.float32, "cpu")
        gradients = has_gradients(op, kwargs)
        found, expected = (
            outputs_and_gradients(f, args, kwargs, gradients) for f in (twin.run, reference.reference)
        )  # fmt: skip
        errors += [error(a, b) for a, b in zip(found, expected, strict=True)]
    return errors


def compile_for(arch: int, op: str, provider: str) -> list:
    from triton.backends.compiler import GPUTarget

    limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
    driver.set_active(
        types.SimpleNamespace(
            get_current_device=lambda: 0,
            set_current_device=lambda _: None,
            get_current_stream=lambda _=None: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_active_torch_device=lambda: torch.device("cpu"),
            get_device_interface=lambda: torch.cuda,
            utils=types.SimpleNamespace(get_device_properties=lambda _: limits),
        )
    )
    pretend_gpu(arch // 10, arch % 10)
    compiled, run = [], jit.JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, len(kernel.asm["cubin"])))
        return kernel

    jit.JITFunction.run, autotuner.Autotuner.run = only_compile, smallest_config
    _, twin = the_twin(op, provider)
    args, kwargs = SMALL[op](examples())[0](torch.float16 if arch < 80 else torch.bfloat16, "cpu")
    outputs_and_gradients(twin.run, args, kwargs, has_gradients(op, kwargs))
    return compiled


def references() -> list[float]:
    """mamba-ssm's own slow functions, which say what its kernels mean."""
    from llmlib import ssm
    from llmlib.ops import kernels

    pretend_gpu(9, 0)
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref

    ex, mode = examples(), kernels("reference")
    mode.__enter__()
    x, dt, A, B, C, D = ex.scan()(torch.float32, "cpu")[0]
    y, h = ssm.selective_scan(x, dt, A, B, C, D, return_state=True)
    theirs = selective_scan_ref(x.mT, dt.mT, A, B.mT, C.mT, D, return_last_state=True)
    errors = [error(y, theirs[0].mT), error(h, theirs[1])]
    x, dt, A, B, C = ex.ssd(t=32, with_D=False)(torch.float32, "cpu")[0]
    y, S = ssm.ssd(x, dt, A, B, C, chunk_size=16, return_state=True)
    B, C = (w.repeat_interleave(2, 2) for w in (B, C))
    theirs = ssd_minimal_discrete(x * dt.unsqueeze(-1), dt * A, B, C, 16)
    errors += [error(y, theirs[0]), error(S, theirs[1])]
    (x, dt, A, B, C, D), state = ex.update_of_mamba2(torch.float32, "cpu")
    y, S = ssm.state_update(x, dt, A, B, C, D, **state)
    theirs = state["state"].clone()
    dt, A, D = dt.expand_as(x), A.expand(theirs.shape[1:]), D.expand_as(x[0])
    errors += [error(y, selective_state_update_ref(theirs, x, dt, A, B, C, D)), error(S, theirs)]
    return errors


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    if mode == "compile":
        print(json.dumps(compile_for(int(rest[0]), *rest[1:])))
    else:
        print(json.dumps(interpret(*rest) if mode == "interpret" else references()))
