"""Counting, against torch's own FLOP counter on real tensors, allocated bytes, and published counts and tables."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmlib import cost, presets
from llmlib.attention import Attention
from llmlib.errors import ConfigError
from llmlib.ffn import SwiGLU
from llmlib.hybrid import Identity, SharedBlock, WithSharedBlock
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.ops import kernels
from llmlib.ssm import Mamba2

ATTENTION = spec(Attention, num_heads=8, num_kv_heads=2, rope_theta=1e4)


def small(*mixers, d_model=64, **changes):
    layers = tuple(Layer(mixer, spec(SwiGLU, d_ff=96)) for mixer in mixers or (ATTENTION, ATTENTION))
    return ModelConfig(vocab_size=101, d_model=d_model, layers=layers, norm=spec(RMSNorm), **changes)


# Counts of the released checkpoints (for Llama 1 and 2 the table of its paper is the rounding of the same numbers).
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    assert cost.parameters(presets.get(name)).total == PUBLISHED[name]


def test_parts_add_up_and_a_tied_head_is_free():
    config = small(tie_embeddings=True)
    parts = cost.parameters(config)
    assert parts.head == 0
    assert parts.total == CausalLM(config).num_parameters()
    assert parts.norm == 5 * 64
    assert parts.embedding == 101 * 64
    assert cost.parameters(small()).head == 101 * 64


@pytest.mark.parametrize("time", [2, 7, 64])
def test_flops_equal_torchs_counter(time):
    """Torch counts every pair of queries and keys; so does masked=False. (It has no count for SDPA's CPU kernel.)"""
    config = small(ATTENTION, ATTENTION.replace(bias=True))
    model, tokens = CausalLM(config), torch.zeros(1, time, dtype=torch.long)
    with FlopCounterMode(display=False) as theirs, kernels("reference"), torch.no_grad():
        model(tokens)
    assert cost.flops(config, time, masked=False).total == theirs.get_total_flops()


def test_flops_behind_a_cache_equal_torchs_counter():
    config, state = small(), None
    model = CausalLM(config)
    state = model.new_state(reserve=40)
    with torch.no_grad():
        model(torch.zeros(1, 33, dtype=torch.long), state)
        with FlopCounterMode(display=False) as theirs, kernels("reference"):
            model(torch.zeros(1, 1, dtype=torch.long), state)
    assert cost.flops(config, 1, 33).total == theirs.get_total_flops()


def test_a_shared_block_costs_at_each_use():
    """Zamba2: the weights stand in one layer, and each layer that uses them computes, and keeps keys, for itself."""
    norm, scan = spec(RMSNorm), spec(Mamba2, head_dim=16, d_state=8)
    block = spec(SharedBlock, attention=spec(Attention, num_heads=4, d_out=64), norm=norm, d_ff=96)

    def use(**first):
        mixer = spec(WithSharedBlock, name="a", mixer=scan, norm=norm, d_ff=96, adapter_rank=4, **first)
        return Layer(mixer, norm=spec(Identity))

    config = small().replace(layers=(Layer(scan), use(block=block), Layer(scan), use(), use()))
    model = CausalLM(config)
    for cached, time in ((0, 7), (33, 1)):
        state = model.new_state(reserve=cached + time)
        with torch.no_grad(), kernels("reference"):
            if cached:
                model(torch.zeros(1, cached, dtype=torch.long), state)
            with FlopCounterMode(display=False) as theirs:
                model(torch.zeros(1, time, dtype=torch.long), state if cached else None)
            assert cost.flops(config, time, cached, masked=False).total == theirs.get_total_flops()
    assert cost.cache(config, 34, dtype=torch.float32) == cost.state_bytes(state)
    # keys and values, two bytes each, twice as wide as the model, at each of the six uses
    assert cost.cache_per_token(presets.get("zamba2-1.2b")) == 2 * 2 * (2 * 2048) * 6


def test_masked_pairs_are_counted_one_by_one():
    from llmlib.attention import visible

    for t, s, causal, window in [
        (5, 5, True, None),
        (3, 9, True, 4),
        (6, 6, False, 3),
        (1, 9, True, 2),
        (4, 4, True, 9),
    ]:
        mask = visible(t, s, causal, window)
        expected = t * s if mask is None else int(mask.sum())
        if t == 1 and window is not None:
            expected = min(s, window)
        assert cost.visible_pairs(t, s, causal, window) == expected, (t, s, causal, window)


def test_palms_formula():
    """PaLM, appendix B (2204.02311): 6N + 12·L·H·Q·T FLOPs per token of training; N without the embedding."""
    config, t = presets.get("llama-2-7b"), 4096
    parts = cost.parameters(config)
    n = parts.mixer + parts.ffn + parts.head
    per_token = 3 * cost.flops(config, t, masked=False).total / t
    assert per_token == 6 * n + 12 * 32 * 32 * 128 * t


def test_windows_cost_as_much_as_they_see():
    config = small(ATTENTION.replace(window=16))
    full, windowed = cost.flops(small(ATTENTION), 512).mixer, cost.flops(config, 512).mixer
    pairs = 512 * 513 // 2 - (16 * 17 // 2 + 496 * 16)
    assert full - windowed == 2 * 8 * pairs * 16


@pytest.mark.parametrize("mixers", [(ATTENTION,), (ATTENTION, ATTENTION.replace(window=16))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_is_what_a_run_allocates(mixers, dtype):
    config = small(*mixers)
    model = CausalLM(config).to(dtype)
    state = model.new_state(reserve=50)
    with torch.no_grad():
        model(torch.zeros(3, 50, dtype=torch.long), state)
    allocated = sum(x.untyped_storage().nbytes() for layer in state for x in layer.values() if hasattr(x, "shape"))
    assert cost.cache(config, 50, 3, dtype) == allocated == cost.state_bytes(state)


def test_cache_per_token():
    """Keys and values, two bytes each: 2 · 2 · kv heads · head width · layers."""
    assert cost.cache_per_token(presets.get("llama-3-8b")) == 2 * 2 * 8 * 128 * 32
    assert cost.cache_per_token(small(ATTENTION.replace(window=16)), 64) == 0


def test_decoding_reads_each_weight_once_and_every_cache():
    config = presets.get("llama-2-7b")
    one, many = cost.decode(config, 2048), cost.decode(config, 2048, batch=32)
    weights = (6_738_415_616 - 32000 * 4096) * 2
    assert one.weight_bytes == weights + 2 * 4096
    assert many.weight_bytes == weights + 32 * 2 * 4096
    assert many.cache_bytes == 32 * one.cache_bytes == 32 * 2 * 2 * 4096 * 32 * 2048
    assert many.flops == 32 * one.flops
    assert one.intensity < 1 < many.intensity < cost.prefill(config, 2048).intensity
    assert one.seconds(1e15, 1e12) == one.bytes / 1e12
    assert one.seconds(1e9, 1e12) == one.flops / 1e9


def test_memory_to_train_is_sixteen_bytes_a_parameter_in_bfloat16():
    config = small()
    assert sum(cost.memory(config, 1, training=True).values()) == 16 * cost.parameters(config).total
    generating = cost.memory(config, 100, 2)
    assert generating == {"weights": 2 * cost.parameters(config).total, "cache": cost.cache(config, 100, 2)}


def test_impossible_requests():
    with pytest.raises(ConfigError, match="time is 0"):
        cost.flops(small(), 0)
    with pytest.raises(ConfigError, match="length is 0"):
        cost.cache(small(), 0)
    with pytest.raises(ConfigError, match="no preset 'llama-3-9b'; the nearest are llama-3-8b"):
        presets.get("llama-3-9b")
