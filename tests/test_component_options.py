"""Options that published models leave at their defaults do what they say."""

import pytest
import torch

from llmlib.attention import CrossAttention
from llmlib.context import Context
from llmlib.ssm import GatedDeltaNet, Mamba2, Mamba3


def test_cross_attention_reads_a_memory_of_another_width():
    layer = CrossAttention(16, num_heads=2, d_memory=24)
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 5, 24, requires_grad=True)
    y = layer(x, context=Context(memory=memory))
    assert y.shape == (2, 3, 16)
    (gradient,) = torch.autograd.grad(y[:, 0].sum(), memory)
    assert (gradient.abs().amax((0, 2)) > 0).all()  # every place of the memory is read


@pytest.mark.parametrize(
    "build",
    [
        lambda spread: Mamba2(64, num_heads=16, head_dim=8, d_state=4, A_range=spread),
        lambda spread: GatedDeltaNet(64, num_heads=16, head_dim=4, A_range=spread),
    ],
)
def test_initial_decays_are_spread_over_their_range(build):
    rates = build((2.0, 3.0)).A_log.exp()
    assert 2.0 <= rates.min() < 2.4 < 2.6 < rates.max() <= 3.0


def test_mamba3_forgets_at_least_as_fast_as_its_floor_says():
    """exp(−A_floor · dt) bounds what is left of a step: with a floor of 10⁴ nothing of the first token is."""
    reached = {}
    for floor in (1e-4, 1e4):
        torch.manual_seed(0)
        layer = Mamba3(16, head_dim=8, d_state=4, A_floor=floor, dt_range=(0.1, 0.2))
        x = torch.randn(1, 6, 16, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x)[:, -1].sum(), x)
        reached[floor] = gradient[0, 0].abs().max().item()
    assert reached[1e-4] > 1e-6
    assert reached[1e4] < 1e-12
