"""Counting, against torch's own FLOP counter on real tensors, allocated bytes, and published counts and tables."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmlib import cost, presets
from llmlib.attention import Attention, CrossAttention
from llmlib.errors import ConfigError
from llmlib.ffn import SwiGLU
from llmlib.hybrid import SharedBlock, WithSharedBlock
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.ops import kernels
from llmlib.position import LearnedPosition

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


@pytest.mark.parametrize("causal", [True, False])
def test_masked_pairs_are_counted_one_by_one(causal):
    for t, s, window in itertools.product(range(1, 7), range(1, 7), (None, 1, 2, 3, 5, 9)):
        pairs = [
            (i, j) for i, j in itertools.product(range(s - t, s), range(s))
            if (not causal or j <= i) and (window is None or abs(i - j) < window)
        ]  # fmt: skip
        if not causal or s >= t:
            assert cost.visible_pairs(t, s, causal, window) == len(pairs), (t, s, window)


def given_and_taken(**options):
    giver, taker = (ATTENTION.replace(**options, **{name: "a"}) for name in ("kv_name", "kv_from"))
    return small(giver, taker, ATTENTION, taker)


def one_block_for_all():
    """Zamba2's: the first layer holds a block that the others find in what the layers of a pass share."""
    inner = spec(Attention, num_heads=8, d_out=64)
    block = spec(SharedBlock, attention=inner, norm=spec(RMSNorm), d_ff=96)
    use = spec(WithSharedBlock, name="b", mixer=ATTENTION, norm=spec(RMSNorm))
    return small(use.replace(block=block), use, use)


@pytest.mark.parametrize("config", [given_and_taken(), given_and_taken(window=6), one_block_for_all()])
def test_what_layers_share_is_there_when_they_are_counted(config):
    model = CausalLM(config)
    for cached, time in ((0, 9), (9, 1), (9, 4)):
        state = model.new_state(reserve=cached + time)
        with torch.no_grad():
            if cached:
                model(torch.zeros(1, cached, dtype=torch.long), state)
            with FlopCounterMode(display=False) as theirs, kernels("reference"):
                model(torch.zeros(1, time, dtype=torch.long), state)
        assert cost.flops(config, time, cached, masked=False).total == theirs.get_total_flops()
        assert cost.cache(config, cached + time, dtype=torch.float32) == cost.state_bytes(state)


BORROWED = [(None, None, 40), (None, 6, 5), (6, 6, 6), (None, 1, 0), (1, 1, 1)]  # window given, taken, keys read


@pytest.mark.parametrize("cache", ["float", "int8"])
@pytest.mark.parametrize(("given", "taken", "read"), BORROWED)
def test_layers_that_borrow_keys_read_them_again(given, taken, read, cache):
    """As Brandon et al. say of sharing between layers (arXiv:2405.12981): it saves memory, not what a step reads."""
    giver = ATTENTION.replace(window=given, kv_name="a", cache=cache)
    taker = ATTENTION.replace(window=taken, kv_from="a", cache=cache)
    row = 2 * 2 * (8 * 2 if cache == "float" else 8 + 4)
    own = (given or 40) * row
    assert cost.cache(small(giver, taker, taker), 40) == own
    assert cost.decode(small(giver, taker, taker), 40).cache_bytes == own + 2 * read * row


def test_slots_that_no_token_has_filled_are_not_read():
    config = small(ATTENTION.replace(window=16))
    assert cost.decode(config, 5).cache_bytes == 5 * 2 * 2 * 8 * 2 < cost.cache(config, 5)
    assert cost.decode(config, 50).cache_bytes == cost.cache(config, 50)


@pytest.mark.parametrize("d_memory", [None, 48])
def test_cross_attention_is_counted(d_memory):
    cross = spec(CrossAttention, num_heads=4, num_kv_heads=2, d_memory=d_memory, gate="head", qk_norm=spec(RMSNorm))
    plain = small()
    config = small().replace(layers=tuple(Layer(x.mixer, x.ffn, cross=cross) for x in plain.layers))
    model, memory = CausalLM(config), torch.randn(1, 7, d_memory or 64)
    for cached, time in ((0, 9), (9, 1)):
        state = model.new_state(reserve=cached + time)
        with torch.no_grad():
            if cached:
                model(torch.zeros(1, cached, dtype=torch.long), state, memory=memory)
            with FlopCounterMode(display=False) as theirs, kernels("reference"):
                model(torch.zeros(1, time, dtype=torch.long), state, memory=memory)
        assert cost.flops(config, time, cached, masked=False, memory=7).total == theirs.get_total_flops()
        assert cost.cache(config, cached + time, dtype=torch.float32, memory=7) == cost.state_bytes(state)
    full = cost.flops(config, 9, memory=7).mixer - cost.flops(plain, 9).mixer
    assert full == cost.flops(config, 9, masked=False, memory=7).mixer - cost.flops(plain, 9, masked=False).mixer
    maps = 2 * (2 * (d_memory or 64) * 2 * 16 + 16)  # of both layers: k_proj, v_proj and the norm on keys
    assert cost.parameters(config).total - maps - 101 * 64 + 64 == cost.decode(config, 9, memory=7).weight_bytes / 2
    for count in (cost.flops, cost.cache, cost.prefill, cost.decode, cost.memory, cost.cache_per_token):
        with pytest.raises(ConfigError, match="memory is 0, and layers of this model read one"):
            count(config, 9)


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


def test_decoding_with_a_mixture_reads_more_experts_for_more_sequences_until_it_reads_all():
    config = presets.get("mixtral-8x7b")
    expert, layers = 3 * 4096 * 14336, 32
    rest = 46_702_792_704 - 8 * expert * layers - 32000 * 4096
    for batch, experts in ((1, 2), (3, 6), (8, 8), (10_000, 8)):
        expected = rest + experts * expert * layers + batch * 4096
        assert cost.decode(config, 64, batch).weight_bytes == 2 * expected


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


@pytest.mark.parametrize("tied", [True, False])
def test_of_tables_the_rows_used_are_read(tied):
    """A head is read whole; of an embedding that isn't it, and of learned positions, a row for each token or place."""
    config = small(tie_embeddings=tied, position=spec(LearnedPosition, max_positions=50))
    parts = cost.parameters(config)
    rest = parts.total - parts.embedding + tied * 101 * 64
    assert cost.decode(config, 9).weight_bytes / 2 == rest + (not tied) * 64 + 64
    assert cost.decode(config, 9, batch=3).weight_bytes / 2 == rest + (not tied) * 3 * 64 + 64
    assert cost.prefill(config, 9, batch=3).weight_bytes / 2 == rest + (not tied) * 27 * 64 + 9 * 64
    assert cost.prefill(config, 40, batch=3).weight_bytes / 2 == rest + (not tied) * 101 * 64 + 40 * 64


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
    with pytest.raises(ConfigError, match="context is 0"):
        cost.decode(small(), 0)
    with pytest.raises(ConfigError, match="no preset 'llama-3-9b'; the nearest are llama-3-8b"):
        presets.get("llama-3-9b")
