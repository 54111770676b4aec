"""Inputs on which each op of `llmlib.ffn` is compared with its twins."""

import torch


def pair(*options, size=3.0):
    def example(dtype, device):
        gate, up = (size * torch.randn(2, 5, 24) for _ in range(2))
        return (gate.to(device, dtype), up.to(device, dtype), *options), {}

    return example


EXAMPLES = {
    "glu": [pair(), pair("gelu"), pair("gelu_tanh"), pair("relu"), pair("sigmoid")],
    "clamped_swiglu": [pair(), pair(1.5, 4.0, size=6.0)],
}
