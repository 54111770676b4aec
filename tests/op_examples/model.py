"""Inputs on which each op of `llmlib.model` is compared with its twins."""

import torch


def rows(n, d, v):
    """Some targets are −100, which don't count."""

    def example(dtype, device):
        targets = torch.randint(0, v, (n,), device=device)
        targets[::3] = -100
        return (torch.randn(n, d).to(device, dtype), torch.randn(v, d).to(device, dtype), targets), {}

    return example


EXAMPLES = {"linear_cross_entropy": [rows(7, 16, 50), rows(2, 8, 5)]}
