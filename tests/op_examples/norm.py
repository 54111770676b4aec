"""Inputs on which each op of `llmlib.norm` is compared with its twins."""

import torch


def rows(*shape, weight=False, bias=False, **options):
    """x of this shape, far from mean 0 and variance 1, with a gain and a bias if asked for."""

    def example(dtype, device):
        x = (3 * torch.randn(shape) + 1).to(device, dtype)
        args = [x]
        if weight:
            args.append(torch.randn(shape[-1]).to(device, dtype))
        if bias:
            args.append(torch.randn(shape[-1]).to(device, dtype))
        return tuple(args), options

    return example


def heads(dtype, device):
    """A gain for each head, as some models have on queries and keys."""
    return (torch.randn(2, 5, 3, 8).to(device, dtype), torch.randn(3, 8).to(device, dtype)), {}


EXAMPLES = {
    "rms_norm": [
        rows(4, 7, 64, weight=True),
        rows(3, 43, 256, weight=True, eps=1e-3),
        rows(3, 33),
        rows(2, 16, weight=True, eps=1e-2),
        heads,
    ],
    "layer_norm": [rows(4, 7, 64, weight=True, bias=True), rows(3, 33), rows(2, 16, weight=True, eps=1e-2), heads],
}
