"""Inputs on which each op of `llmlib.position` is compared with its twins."""

import torch

from llmlib.position import RoPE


def heads(dim, rope_dim=None, batched=False, **options):
    def example(dtype, device):
        x = torch.randn(2, 3, 10, dim).to(device, dtype)
        positions = torch.randint(0, 50, (2, 10)) if batched else torch.arange(10)
        angles = RoPE(rope_dim or dim).angles(positions.to(device), torch.promote_types(dtype, torch.float32))
        return (x, *angles), options

    return example


EXAMPLES = {
    "rope": [
        heads(16, interleaved=True),
        heads(16, interleaved=True, batched=True),
        heads(16),
        heads(24, rope_dim=8, batched=True),
        heads(24, rope_dim=8, interleaved=True),
    ]
}
