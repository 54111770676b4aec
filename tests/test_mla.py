"""Multi-head latent attention: two forms that are one, transformers' DeepSeek, and a cache that holds latents only."""

import pytest
import torch
from torch import nn

from llmlib.attention import MLA, cache_bytes, max_logits, qk_clip_
from llmlib.context import Context
from llmlib.errors import ConfigError
from llmlib.ops import kernels

torch.set_num_threads(1)
double = {"dtype": torch.float64}
SIZES = {"num_heads": 4, "kv_latent_dim": 16, "head_dim": 12, "v_head_dim": 10, "d_rope": 8}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 6, "factor": 8.0}  # fmt: skip
KINDS = {
    "plain": {},
    "query latent": {"q_latent_dim": 24, "rope_interleaved": True},
    "no positions": {"d_rope": 0},
    "int8": {"cache": "int8"},
    "absorbed": {"absorb": True},
    "expanded": {"absorb": False},
}


def make(**options):
    torch.manual_seed(1)
    layer = MLA(48, **SIZES | options).double()
    layer.reset_parameters(0.3)
    return layer


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["plain", "query latent", "no positions"])
def test_expanded_and_absorbed_are_one(kind, mode):
    layer, x = make(**KINDS[kind]), torch.randn(2, 13, 48, **double)
    results = []
    for layer.absorb in (True, False):
        with kernels(mode):
            y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    for absorbed, expanded in zip(*results, strict=True):
        assert torch.allclose(absorbed, expanded, rtol=1e-12, atol=1e-12 * expanded.abs().max().item())
    assert results[0][0].abs().max() > 0.1


@pytest.mark.parametrize("q_rank", [None, 24])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("yarn", [False, True])
def test_it_equals_transformers_deepseek(q_rank, interleave, yarn):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    scaling = {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
    rope = {"rope_type": "yarn", **scaling} if yarn else {"rope_type": "default"}
    config = DeepseekV3Config(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=q_rank,
        qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10, attn_implementation="eager", attention_bias=True,
        rope_interleave=interleave, rope_parameters={**rope, "rope_theta": 1e4}, max_position_embeddings=128,
    )  # fmt: skip
    theirs = DeepseekV3Attention(config, layer_idx=0)
    ours = MLA(48, **SIZES, q_latent_dim=q_rank, rope_interleaved=interleave, bias=True,
               rope_scaling={"type": "yarn", **scaling} if yarn else None)  # fmt: skip
    for p in theirs.parameters():
        nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.3)
    names = {"_with_mqa": "", "_layernorm": "_norm"}
    weights = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    ours.load_state_dict(weights)
    x = torch.randn(2, 11, 48)
    mask = torch.full((1, 1, 11, 11), -torch.inf).triu(1)
    want = theirs(x, DeepseekV3RotaryEmbedding(config)(x, torch.arange(11)[None]), mask)[0]
    for ours.absorb in (True, False):
        assert torch.allclose(ours(x), want, atol=5e-5 * want.abs().max().item())


@pytest.mark.parametrize("sizes", [[1] * 15, [15], [6, 1, 1, 4, 1, 2]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_any_length_equal_the_full_pass(kind, sizes):
    layer, x, state = make(**KINDS[kind]), torch.randn(2, 15, 48, **double), {}
    with torch.no_grad():
        y = torch.cat([layer(part, state) for part in x.split(sizes, 1)], 1)
        assert torch.allclose(y, layer(x, {} if kind == "int8" else None), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_and_documents(kind):
    layer = make(**KINDS[kind])

    def alone(text):
        return layer(text, {} if kind == "int8" else None)

    texts = [torch.randn(1, n, 48, **double) for n in (12, 7)]
    x = torch.cat([texts[0], torch.cat([torch.randn(1, 5, 48, **double), texts[1]], 1)])
    valid = torch.arange(12) >= torch.tensor([[0], [5]])
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        state, out = {}, []
        for at in (8, *range(9, 13)):
            new = slice(0 if at == 8 else at - 1, at)
            out.append(layer(x[:, new], state, Context(positions[:, new], valid[:, :at])))
        y = torch.cat(out, 1)
        assert torch.allclose(y[0], alone(texts[0])[0], atol=1e-11)
        assert torch.allclose(y[1, 5:], alone(texts[1])[0], atol=1e-11)
        packed = torch.cat(texts, 1)
        documents = torch.tensor([[0] * 12 + [1] * 7])
        restarted = torch.cat([torch.arange(12), torch.arange(7)])
        got = layer(packed, {} if kind == "int8" else None, Context(restarted, documents=documents))
        assert torch.allclose(got, torch.cat([alone(text) for text in texts], 1), atol=1e-11)


def test_frequencies_that_grow_with_the_text():
    layer, x, state = make(rope_scaling=LONGROPE), torch.randn(2, 10, 48, **double), {}
    with torch.no_grad():
        for i in range(10):
            y = layer(x[:, i : i + 1], state)
            assert torch.allclose(y[:, 0], layer(x[:, : i + 1])[:, -1], atol=1e-12)
        assert not torch.allclose(layer(x)[:, :6], layer(x[:, :6]), atol=1e-4)


def test_each_text_and_each_document_has_frequencies_of_its_own():
    layer, texts = make(rope_scaling=LONGROPE), [torch.randn(1, n, 48, **double) for n in (9, 3, 7)]
    alone = torch.cat([layer(text) for text in texts], 1)
    valid = torch.arange(9) >= 9 - torch.tensor([[9], [3], [7]])
    batch = torch.cat([torch.cat([torch.randn(1, 9 - x.shape[1], 48, **double), x], 1) for x in texts])
    documents, positions = torch.tensor([[5] * 9 + [2] * 3 + [8] * 7]), torch.cat([torch.arange(n) for n in (9, 3, 7)])
    with torch.no_grad():
        y = layer(batch, None, Context((valid.long().cumsum(1) - 1).clamp(min=0), valid))
        assert torch.allclose(y[valid][None], alone, atol=1e-12)
        y = layer(torch.cat(texts, 1), None, Context(positions, documents=documents))
        assert torch.allclose(y, alone, atol=1e-12)


@pytest.mark.parametrize("scaling", [None, LONGROPE])
def test_impossible_positions_are_named(scaling):
    for at, message in (([-1, 0], "a position is -1"), ([0, 1, 2], "3 positions for 2 new tokens")):
        with pytest.raises(ConfigError, match=message):
            make(rope_scaling=scaling)(torch.randn(1, 2, 48, **double), None, Context(torch.tensor(at)))


def test_causality_by_gradient():
    layer, x = make(), torch.randn(1, 9, 48, requires_grad=True, **double)
    for layer.absorb in (True, False):
        seen = torch.autograd.grad(layer(x)[0, 4].sum(), x)[0][0].abs().sum(-1) > 0
        assert seen.tolist() == [True] * 5 + [False] * 4


def test_the_cache_holds_one_latent_and_one_rotary_key():
    state, x = {}, torch.randn(3, 20, 48)
    layer = MLA(48, **SIZES)
    with torch.no_grad():
        layer(x, state)
        assert cache_bytes(state) == 3 * 20 * (16 + 8) * 4
        state = {}
        MLA(48, **SIZES, cache="int8")(x, state)
        assert cache_bytes(state) == 3 * 20 * (16 + 8 + 4)


def test_the_form_with_fewer_multiplications_is_taken():
    """DeepSeek-V2's sizes: a prompt is expanded, a step with a cache absorbed, and the count says where they meet."""
    layer = MLA(64, num_heads=2, kv_latent_dim=512, head_dim=128, d_rope=64)
    assert not layer._absorbing_is_cheaper(4096, 4096)
    assert layer._absorbing_is_cheaper(1, 4096)
    up = 512 * 256

    def counts(t, s):
        return t * up + t * s * (512 + 64 + 512), s * up + t * s * (192 + 128)

    for t, s in ((1, 1), (1, 2), (64, 4096), (170, 4096), (171, 4096), (200, 4096)):
        absorbed, expanded = counts(t, s)
        assert layer._absorbing_is_cheaper(t, s) == (absorbed < expanded)


def test_qk_clip_brings_each_head_to_the_limit():
    layer, x = make(q_latent_dim=24), torch.randn(2, 9, 48, **double)
    before = max_logits(layer, x)
    limit = before.median().item()
    gamma = qk_clip_(layer, before, limit)
    assert torch.allclose(max_logits(layer, x), before * gamma)
    assert (gamma < 1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_rope": 7}, "even"),
        ({"kv_latent_dim": 0}, "kv_latent_dim is 0"),
        ({"q_latent_dim": 0}, "q_latent_dim is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"v_head_dim": 0}, "v_head_dim is 0"),
        ({"d_rope": -2}, "d_rope is -2"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"cache": "int4"}, "cache is 'int4'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "0.5, and must be at least 1"),
    ],
)
def test_errors_name_what_is_wrong(options, message):
    with pytest.raises(ConfigError, match=message):
        MLA(48, **SIZES | options)
