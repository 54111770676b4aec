"""The Triton twins without a GPU: interpreted beside the reference, compiled for GPUs of three generations.

They run where triton ≥ 3.9 and the providers can be found; neither is needed on a CPU (README, "GPU kernels").
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmlib.ops import available

MODULES = {"mamba-ssm": "mamba_ssm", "fla": "fla"}
TWINS = [
    ("ssd", "mamba-ssm"), ("ssd", "fla"), ("state_update", "mamba-ssm"), ("causal_conv", "fla"),
    ("gated_delta_rule", "fla"), ("mamba3_scan", "mamba-ssm"),
]  # fmt: skip
pytestmark = pytest.mark.slow
twins = pytest.mark.parametrize(("op", "provider"), TWINS, ids=lambda name: name)


def run(*arguments):
    script = Path(__file__).parent / "triton_without_gpu.py"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def needs(provider):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip(f"triton {triton.__version__} interprets too little; 3.9 does")
    if not available(MODULES[provider]):
        pytest.skip(f"{provider} is not installed")


@twins
def test_an_interpreted_twin_equals_its_reference(op, provider):
    needs(provider)
    errors = run("interpret", op, provider)
    assert len(errors) >= 4 and max(errors) < 1e-5, errors


@twins
@pytest.mark.parametrize("arch", [75, 80, 90])
def test_a_twin_compiles(op, provider, arch):
    needs(provider)
    if op == "mamba3_scan" and arch < 80:
        pytest.skip("Mamba-3's kernels compute in bfloat16, which sm_75 lacks")
    kernels = run("compile", str(arch), op, provider)
    assert kernels and all(size > 1000 for _, size in kernels)


def test_mamba_ssm_means_the_same():
    needs("mamba-ssm")
    errors = run("references")
    assert len(errors) == 6 and max(errors) < 1e-5, errors
