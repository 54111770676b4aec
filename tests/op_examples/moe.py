"""Inputs for the ops of `llmlib.moe`: experts with no row, one row, all rows; with and without biases."""

import torch


def _expert_linear(counts, d=16, f=24, bias=False):
    def make(dtype, device):
        generator = torch.Generator().manual_seed(sum(counts) + len(counts))

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        sizes = torch.tensor(counts, device=device)
        args = random(sum(counts), d), random(len(counts), f, d) / d**0.5, sizes
        return (*args, random(len(counts), f)) if bias else args, {}

    return make


def _expert_swiglu(counts, d=16, f=24):
    def make(dtype, device):
        (x, gate, sizes), _ = _expert_linear(counts, d, f)(dtype, device)
        up, down = gate.flip(0, 1), gate.flip(2).mT.contiguous()
        return (x, gate, up, down, sizes), {}

    return make


EXAMPLES = {
    "expert_swiglu": [
        _expert_swiglu([3, 0, 5, 1]),
        _expert_swiglu([0, 33, 0]),
        _expert_swiglu([7]),
        _expert_swiglu([17, 16, 1], d=32, f=8),
    ],
    "expert_linear": [
        _expert_linear([3, 0, 5, 1]),
        _expert_linear([3, 0, 5, 1], bias=True),
        _expert_linear([0, 0, 9, 0]),
        _expert_linear([7], bias=True),
        _expert_linear([2, 4, 1, 8, 0, 3], d=32, f=8),
    ],
}
