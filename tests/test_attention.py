"""Attention: against its definition, transformers' modules, and by property; every cache equals the full pass."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import EXAMPLES, assert_all_close
from torch import nn

from llmlib.attention import (
    Attention,
    CrossAttention,
    attention,
    cache_bytes,
    flex,
    max_logits,
    qk_clip_,
    quantise,
    to_grouped,
    visible,
)
from llmlib.context import Context
from llmlib.errors import ConfigError, KernelUnavailableError
from llmlib.norm import LayerNorm, RMSNorm
from llmlib.ops import kernels, record
from llmlib.position import ALiBi, T5Bias

torch.set_num_threads(1)
double = {"dtype": torch.float64}


def by_definition(q, k, v, n, h, i, *, causal, window, mask, bias, sinks, softcap, scale):
    """Row i of head h in text n, number by number."""
    t, s, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    at, terms = i + s - t, []
    mask = None if mask is None else mask.expand(len(q), q.shape[1], t, s)[n, h, i]
    for j in range(s):
        seen = (not causal or j <= at) and (window is None or abs(at - j) < window) and (mask is None or mask[j])
        if seen:
            score = sum(a * b for a, b in zip(q[n, h, i].tolist(), k[n, h // group, j].tolist(), strict=True)) * scale
            score = score if softcap is None else softcap * math.tanh(score / softcap)
            terms.append((math.exp(score + (0 if bias is None else bias[h, i, j].item())), v[n, h // group, j]))
    total = sum(w for w, _ in terms) + (0 if sinks is None else math.exp(sinks[h]))
    return sum((w / total * row for w, row in terms), torch.zeros(v.shape[-1], **double))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_op_is_its_definition(data):
    draw, pick = data.draw, lambda *options: data.draw(st.sampled_from(options))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    g, group, t, causal = pick(1, 2), pick(1, 3), draw(st.integers(1, 6)), pick(True, False)
    h, s = g * group, draw(st.integers(t if causal else 1, t + 4))
    q, k, v = torch.randn(2, h, t, 4, **double), torch.randn(2, g, s, 4, **double), torch.randn(2, g, s, 3, **double)
    options = {
        "causal": causal,
        "window": pick(None, 1, 3),
        "mask": torch.rand(pick(1, 2), pick(1, h), t, pick(1, s)) < 0.7 if pick(True, False) else None,
        "bias": torch.randn(h, t, s, **double) if pick(True, False) else None,
        "sinks": torch.randn(h, **double) + pick(0, 200, -200) if pick(True, False) else None,
        "softcap": pick(None, 1.5),
        "scale": 0.7,
    }
    for mode in ("reference", "auto"):
        with kernels(mode):
            y = attention(q, k, v, **options)
        for at in itertools.product(range(2), range(h), range(t)):
            assert torch.allclose(y[at], by_definition(q, k, v, *at, **options), atol=1e-12)


def test_sinks_far_from_the_scores_in_float32():
    """e²⁰⁰ is beyond float32: a sink that draws all weight away leaves zeros, also as gradients, and no NaN."""
    q, k, v = (torch.randn(1, 3, 5, 4) for _ in range(3))
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, torch.tensor([200.0, -200.0, 1.0]))]
        if dtype is torch.float32:
            y = attention(*inputs[:3], sinks=inputs[3])
        else:
            scores = (inputs[0] @ inputs[1].mT / 2).masked_fill(~visible(5, 5, True, None), -torch.inf)
            sink = inputs[3][:, None, None].expand(1, 3, 5, 1)
            y = torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ inputs[2]
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got.double(), want, atol=1e-5)


@pytest.mark.parametrize("mode", ["reference", "sdpa", "tiled", "auto"])
@pytest.mark.parametrize("window", [None, 5, 1])
def test_causality_and_the_window_by_gradient(mode, window):
    t = 300 if window and mode == "auto" else 24  # long enough for the banded twin
    q, k, v = (torch.randn(1, 1, t, 4, requires_grad=True, **double) for _ in range(3))
    with kernels(mode):
        y = attention(q, k, v, window=window)
    for i in (0, 7, t - 1):
        seen = torch.autograd.grad(y[0, 0, i].sum(), v, retain_graph=True)[0][0, 0].abs().sum(-1) > 0
        first = 0 if window is None else max(0, i - window + 1)
        assert seen.nonzero().flatten().tolist() == list(range(first, i + 1))
        for x in (k, q):
            moved = torch.autograd.grad(y[0, 0, i].sum(), x, retain_graph=True)[0][0, 0].abs().sum(-1)
            assert not moved[i + 1 :].any()


@pytest.mark.parametrize("mode", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_that_may_look_nowhere_is_zero_and_so_are_its_gradients(mode, dtype, bias):
    q, k, v = (torch.randn(2, 2, 5, 8).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, 3], mask[1] = False, False
    with kernels(mode):
        y = attention(q, k, v, mask=mask, bias=torch.randn(2, 5, 5).to(dtype) if bias else None)
    y.float().square().sum().backward()
    assert not y[0, :, 3].any()
    assert not y[1].any()
    assert y[0, :, 4].all()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))
    assert not q.grad[0, :, 3].any()


def test_which_kernel_runs():
    q = torch.randn(1, 2, 300, 8)

    def chosen(**options):
        with record() as choices:
            attention(q, q, q, **options)
        return choices[0].kernel

    assert chosen() == "sdpa"
    assert chosen(window=8) == "banded"
    assert chosen(window=290) == "sdpa"
    assert chosen(softcap=3.0) == "reference"
    with pytest.raises(KernelUnavailableError, match="softcap"), kernels("sdpa"):
        attention(q, q, q, softcap=3.0)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("number", range(len(EXAMPLES["attention"])))
def test_what_the_gpu_kernel_is_told(number):
    """FlexAttention's own eager form computes the formula that it compiles on a GPU; on the CPU it has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    args, options = EXAMPLES["attention"][number](torch.float32, "cpu")
    with torch.no_grad():
        assert_all_close(
            "output", [flex(flex_attention, *args, **options)], [attention.reference(*args, **options)], 1e-5
        )


# --- the layer, against transformers -------------------------------------------------------------------------------


def rope_for(config, x, kind):
    """cos and sin of transformers' own rotary module."""
    return kind(config)(x, torch.arange(x.shape[1])[None])


def causal_mask(t, window=None):
    return torch.zeros(1, 1, t, t).masked_fill(~visible(t, t, True, window), -torch.inf)


def family(name):
    """(transformers' attention, its rotary module or None, its config, our options)."""
    import transformers as tf
    from transformers.models.gemma2 import modeling_gemma2 as gemma2
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.olmo import modeling_olmo as olmo
    from transformers.models.olmo2 import modeling_olmo2 as olmo2
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
             "head_dim": 8, "attn_implementation": "eager", "max_position_embeddings": 64}  # fmt: skip
    ours = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 1e4}
    llama3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    wide = {k: v for k, v in sizes.items() if k != "head_dim"}

    def scaled(kind, **options):
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}

    if name == "llama":
        config = tf.LlamaConfig(**sizes, attention_bias=True, **scaled("llama3", **llama3))
        ours |= {"bias": True, "rope_scaling": {"type": "llama3", **llama3}}
        return llama.LlamaAttention, llama.LlamaRotaryEmbedding, config, ours
    if name == "qwen3":
        return (
            qwen3.Qwen3Attention,
            qwen3.Qwen3RotaryEmbedding,
            tf.Qwen3Config(**sizes, **plain),
            ours | {"qk_norm": RMSNorm},
        )
    if name == "olmo2":
        config = tf.Olmo2Config(**wide, **plain, rms_norm_eps=1e-6)
        ours |= {"qk_norm": RMSNorm, "qk_norm_over": "width"}
        return olmo2.Olmo2Attention, olmo2.Olmo2RotaryEmbedding, config, ours
    if name == "olmo":
        config = tf.OlmoConfig(**wide, **plain, clip_qkv=0.1)
        return olmo.OlmoAttention, olmo.OlmoRotaryEmbedding, config, ours | {"clip_qkv": 0.1}
    if name == "gemma2":
        own = {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20}
        config = tf.Gemma2Config(**sizes | {"head_dim": 12}, **own, **plain)
        ours |= {"head_dim": 12, "window": 5, "softcap": 2.0, "scale": 20**-0.5}
        return gemma2.Gemma2Attention, gemma2.Gemma2RotaryEmbedding, config, ours
    config = tf.GptOssConfig(**sizes | {"head_dim": 16}, sliding_window=5, **scaled("yarn", **yarn))
    ours |= {"head_dim": 16, "window": 5, "sinks": True, "bias": True, "rope_scaling": {"type": "yarn", **yarn}}
    return gpt_oss.GptOssAttention, gpt_oss.GptOssRotaryEmbedding, config, ours


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "olmo", "gemma2", "gpt_oss"])
def test_the_layer_equals_transformers(name):
    module, rotary, config, options = family(name)
    theirs, ours = module(config, layer_idx=0).eval(), Attention(32, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 20, 32)
    want = theirs(x, rope_for(config, x, rotary), causal_mask(20, options.get("window")))[0]
    assert torch.allclose(ours(x), want, atol=3e-5)


def test_norms_after_rope_and_for_each_head():
    x = torch.randn(2, 6, 32)
    layer = Attention(32, num_heads=4, rope_theta=1e4, qk_norm=RMSNorm, qk_norm_after_rope=True)
    before = Attention(32, num_heads=4, rope_theta=1e4, qk_norm=RMSNorm)
    before.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x), before(x), atol=1e-6)  # a turn keeps the norm, so a gain of one commutes with it
    nn.init.uniform_(layer.q_norm.weight)
    before.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x), before(x), atol=1e-3)
    each = Attention(32, num_heads=4, num_kv_heads=2, qk_norm=LayerNorm, qk_norm_over="each")
    assert each.q_norm.weight.shape == (4, 8)
    assert each.k_norm.weight.shape == (2, 8)
    nn.init.constant_(each.q_norm.weight[1], 0.0)
    assert not each.queries_keys(x)[0][:, 1].any()


@pytest.mark.parametrize("gate", ["elementwise", "head"])
def test_a_gate_multiplies_before_the_output(gate):
    layer, x = Attention(32, num_heads=4, gate=gate), torch.randn(2, 6, 32)
    plain = Attention(32, num_heads=4)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "gate" not in k})
    nn.init.zeros_(layer.gate_proj.weight)
    assert torch.allclose(layer(x), plain(x) / 2, atol=1e-7)
    nn.init.normal_(layer.gate_proj.weight)
    inner = []
    plain.o_proj.register_forward_pre_hook(lambda _, args: inner.append(args[0]))
    plain(x)
    g = torch.sigmoid(layer.gate_proj(x))
    g = g.repeat_interleave(8, -1) if gate == "head" else g
    assert torch.allclose(layer(x), plain.o_proj(inner[0] * g), atol=1e-6)


def test_biases_can_be_named_one_by_one():
    whisper = Attention(8, num_heads=2, bias=("q_proj", "v_proj", "o_proj"))
    assert [p.bias is not None for p in (whisper.q_proj, whisper.k_proj, whisper.v_proj, whisper.o_proj)] == [
        1,
        0,
        1,
        1,
    ]
    qwen2 = Attention(8, num_heads=2, bias=True, out_bias=False)
    assert [p.bias is not None for p in (qwen2.k_proj, qwen2.o_proj)] == [1, 0]
    assert Attention(16, num_heads=2, d_out=8)(torch.randn(1, 3, 16)).shape == (1, 3, 8)


def test_cross_attention_equals_torch():
    ours, theirs = CrossAttention(32, num_heads=4, bias=True), nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    for name, w, b in zip("qkv", theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True):
        getattr(ours, f"{name}_proj").load_state_dict({"weight": w, "bias": b})
    ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    assert torch.allclose(ours(x, None, Context(memory=memory)), theirs(x, memory, memory)[0], atol=1e-6)
    valid = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    context = Context(memory=memory, shared={"memory_valid": valid})
    want = theirs(x, memory, memory, key_padding_mask=~valid)[0]
    assert torch.allclose(ours(x, None, context), want, atol=1e-6)
    state = {}
    steps = [ours(x[:, i : i + 1], state, context) for i in range(5)]
    assert torch.allclose(torch.cat(steps, 1), want, atol=1e-6)


@pytest.mark.parametrize("gate", ["elementwise", "head"])
def test_cross_attention_is_its_formula(gate):
    layer = CrossAttention(32, num_heads=4, num_kv_heads=2, qk_norm=RMSNorm, softcap=0.8, scale=0.6, gate=gate).double()
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.4)
    x, memory = torch.randn(3, 32, **double), torch.randn(5, 32, **double)
    q, k, v, opened = (x @ layer.q_proj.weight.T, memory @ layer.k_proj.weight.T, memory @ layer.v_proj.weight.T,
                       1 / (1 + torch.exp(-x @ layer.gate_proj.weight.T)))  # fmt: skip
    out = []
    for h in range(4):
        own, group = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
        a, b = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q[:, own], k[:, group]))
        weights = torch.exp(0.8 * torch.tanh(0.6 * (a * layer.q_norm.weight) @ (b * layer.k_norm.weight).T / 0.8))
        y = weights / weights.sum(-1, keepdim=True) @ v[:, group]
        out.append(y * (opened[:, own] if gate == "elementwise" else opened[:, h : h + 1]))
    want = torch.cat(out, -1) @ layer.o_proj.weight.T
    assert torch.allclose(layer(x[None], None, Context(memory=memory[None]))[0], want, atol=1e-12)


def test_an_encoder_sees_both_sides():
    layer, x = Attention(16, num_heads=2, causal=False, window=3), torch.randn(1, 9, 16, requires_grad=True)
    seen = torch.autograd.grad(layer(x)[0, 4].sum(), x)[0][0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


# --- decoding ------------------------------------------------------------------------------------------------------

LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 100, "factor": 8.0}  # fmt: skip
# slopes of which no product with a small whole number is exact in bfloat16, so that a shift of all places shows
ROUNDED_ALIBI = functools.partial(ALiBi, bfloat16=True, max_bias=5.3)
KINDS = {
    "mha": {"rope_theta": 1e4},
    "gqa": {"rope_theta": 1e4, "num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1, "rope_theta": 1e4, "rope_dim": 4, "rope_interleaved": True},
    "nope": {},
    "window": {"window": 5, "rope_theta": 1e4, "num_kv_heads": 2},
    "window of one": {"window": 1},
    "int8": {"cache": "int8", "rope_theta": 1e4},
    "int8 window": {"cache": "int8", "window": 5, "num_kv_heads": 2},
    "sinks": {"sinks": True, "window": 5, "num_kv_heads": 2, "rope_theta": 1e4},
    "softcap": {"softcap": 2.0, "num_kv_heads": 2},
    "alibi": {"position_bias": ALiBi, "num_kv_heads": 2},
    "alibi window": {"position_bias": ALiBi, "window": 5},
    "falcon": {"position_bias": ROUNDED_ALIBI},
    "falcon window": {"position_bias": ROUNDED_ALIBI, "window": 5},
    "t5": {"position_bias": T5Bias, "window": 7},
    "qk norm, gate": {"qk_norm": RMSNorm, "gate": "elementwise", "rope_theta": 1e4},
    "norm after rope": {"qk_norm": RMSNorm, "qk_norm_after_rope": True, "rope_theta": 1e4},
    "longrope": {"rope_theta": 1e4, "rope_scaling": LONGROPE, "num_kv_heads": 2},
    "longrope window": {"rope_theta": 1e4, "rope_scaling": LONGROPE, "window": 5},
}


def make(kind, dtype=torch.float64, **more):
    torch.manual_seed(1)
    layer = Attention(32, num_heads=4, **KINDS[kind], **more).to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.4)
    return layer


def full_pass(layer, x, context=None):
    """What decoding must give. An 8-bit cache sees rounded keys and values, and so must its oracle."""
    return layer(x, {} if layer.cache.__class__.__name__ == "Int8Cache" else None, context)


def in_pieces(layer, x, sizes, valid=None, documents=None, positions=None):
    state, out, at = {}, [], 0
    if valid is not None:
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    for size in sizes:
        at += size
        context = Context(
            positions=None if positions is None else positions[..., at - size : at],
            valid=None if valid is None else valid[:, :at],
            documents=None if documents is None else documents[:, :at],
        )
        out.append(layer(x[:, at - size : at], state, context))
    return torch.cat(out, 1), state


@pytest.mark.parametrize("sizes", [[1] * 23, [23], [5] * 4 + [3], [4, 1, 1, 6, 1, 10], [16, 1, 1, 1, 4]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_any_length_equal_the_full_pass(kind, sizes):
    layer, x = make(kind), torch.randn(2, 23, 32, **double)
    with torch.no_grad():
        assert torch.allclose(in_pieces(layer, x, sizes)[0], full_pass(layer, x), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_in_one_batch(kind):
    layer, lengths, new = make(kind), (9, 4, 1), 8
    texts = [torch.randn(1, n + new, 32, **double) for n in lengths]
    x = torch.cat(
        [torch.cat([torch.randn(1, 9 - n, 32, **double), text], 1) for n, text in zip(lengths, texts, strict=True)]
    )
    valid = torch.arange(9 + new) >= 9 - torch.tensor(lengths)[:, None]
    with torch.no_grad():
        for sizes in ([9] + [1] * new, [4, 5, 8], [17]):
            y, _ = in_pieces(layer, x, sizes, valid)
            for row, n, text in zip(y, lengths, texts, strict=True):
                assert torch.allclose(row[9 - n :], full_pass(layer, text)[0], atol=1e-11), (n, sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind):
    layer, x = make(kind), torch.randn(1, 20, 32, **double)
    documents = torch.tensor([[0] * 6 + [1] * 3 + [2] * 11])
    want = torch.cat([full_pass(layer, part) for part in x.split([6, 3, 11], 1)], 1)
    positions = torch.cat([torch.arange(n) for n in (6, 3, 11)])
    with torch.no_grad():
        assert torch.allclose(full_pass(layer, x, Context(positions, documents=documents)), want, atol=1e-11)
        for sizes in ([20], [4, 1, 1, 5] + [1] * 9):
            y, _ = in_pieces(layer, x, sizes, documents=documents, positions=positions)
            assert torch.allclose(y, want, atol=1e-11)


GROWING = {"dynamic": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 6}}
GROWING |= {"longrope": LONGROPE | {"original_max_position_embeddings": 6}}


def make_growing(kind, **options):
    torch.manual_seed(0)
    layer = Attention(32, num_heads=4, rope_theta=1e4, rope_scaling=GROWING[kind], **options).double()
    layer.reset_parameters(0.5)
    return layer


@pytest.mark.parametrize("kind", GROWING)
def test_frequencies_that_grow_with_the_text(kind):
    """A step equals the last token of a full pass over the text so far, before, at and beyond the original length."""
    layer = make_growing(kind)
    x, state = torch.randn(2, 12, 32, **double), {}
    with torch.no_grad():
        for i in range(12):
            y = layer(x[:, i : i + 1], state)
            assert torch.allclose(y[:, 0], layer(x[:, : i + 1])[:, -1], atol=1e-12)
        short = layer(x[:, :6])
        assert not torch.allclose(layer(x)[:, :6], short, atol=1e-3)  # the test can tell the two regimes apart


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", GROWING)
def test_each_text_and_each_document_has_frequencies_of_its_own(kind, window):
    """Beside and behind longer ones, within the original length of 6 or beyond it."""
    layer = make_growing(kind, window=window)
    texts = [torch.randn(1, n, 32, **double) for n in (9, 3, 7)]
    alone = torch.cat([layer(text) for text in texts], 1)
    valid = torch.arange(9) >= 9 - torch.tensor([[9], [3], [7]])
    batch = torch.cat([torch.cat([torch.randn(1, 9 - x.shape[1], 32, **double), x], 1) for x in texts])
    documents, positions = torch.tensor([[5] * 9 + [2] * 3 + [8] * 7]), torch.cat([torch.arange(n) for n in (9, 3, 7)])
    with torch.no_grad():
        assert torch.allclose(in_pieces(layer, batch, [9], valid)[0][valid][None], alone, atol=1e-12)
        x = torch.cat(texts, 1)
        assert torch.allclose(layer(x, None, Context(positions, documents=documents)), alone, atol=1e-12)
        assert torch.allclose(in_pieces(layer, x, [9, 3, 7], None, documents, positions)[0], alone, atol=1e-12)
        steps = in_pieces(layer, x, [1] * 19, None, documents, positions)[0]
        so_far = [layer(text[:, : i + 1])[:, -1:] for text in texts for i in range(text.shape[1])]
        assert torch.allclose(steps, torch.cat(so_far, 1), atol=1e-12)


@pytest.mark.parametrize(("given", "taken"), [(None, None), (None, 4), (4, 4), (4, None), (8, 4), (4, 8)])
def test_windows_of_layers_that_share_keys(given, taken):
    options = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 1e4}
    layers = Attention(32, **options, window=given, kv_name="a"), Attention(32, **options, window=taken, kv_from="a")
    x = torch.randn(2, 11, 32, **double)

    def run(sizes):
        states, out = ({}, {}), []
        for part in x.split(sizes, 1):
            context = Context()
            y = [layer.double()(part, state, context) for layer, state in zip(layers, states, strict=True)]
            out.append(y[1])
        return torch.cat(out, 1)

    if given not in (None, taken):
        with pytest.raises(ConfigError, match=f"window is {taken} in a layer with kv_from='a', and {given} in the"):
            run([11])
        return
    for sizes in ([1] * 11, [6, 1, 4]):
        assert torch.allclose(run(sizes), run([11]), atol=1e-12)


def test_layers_that_share_keys_have_as_many_heads_of_them():
    context = Context()
    Attention(32, num_heads=4, num_kv_heads=2, kv_name="a")(torch.randn(1, 3, 32), None, context)
    with pytest.raises(ConfigError, match="num_kv_heads is 4 in a layer with kv_from='a', and 2 in the layer that"):
        Attention(32, num_heads=4, kv_from="a")(torch.randn(1, 3, 32), None, context)


def test_layers_that_share_keys_and_values():
    torch.manual_seed(0)
    options = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 1e4}
    giver = Attention(32, **options, kv_name="a").double()
    taker = Attention(32, **options, kv_from="a").double()
    twin = Attention(32, **options).double()  # the taker with the giver's own keys and values
    x, y = torch.randn(2, 9, 32, **double), torch.randn(2, 9, 32, **double)
    twin.load_state_dict(giver.state_dict() | taker.state_dict())
    q = twin.q_proj(y).view(2, 9, 4, 8).transpose(1, 2)
    context = Context()
    giver(x, None, context)
    got = taker(y, None, context)
    _, k = twin.queries_keys(x)
    v = twin.v_proj(x).view(2, 9, 2, 8).transpose(1, 2)
    want = twin.o_proj(attention(twin._turn(q, None, 0, Context())[0], k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(got, want, atol=1e-12)
    assert {n.split(".")[0] for n, _ in taker.named_parameters()} == {"q_proj", "o_proj"}
    states, steps = ({}, {}), []
    for i in range(9):
        context = Context()
        giver(x[:, i : i + 1], states[0], context)
        steps.append(taker(y[:, i : i + 1], states[1], context))
    assert torch.allclose(torch.cat(steps, 1), got, atol=1e-12)
    assert cache_bytes(states[1]) == 0
    with pytest.raises(ConfigError, match="no earlier layer of this pass has kv_name='a'"):
        taker(y)


def test_local_and_global_layers_with_two_rope_bases_and_some_without():
    """Gemma 3's pattern beside RoPE/NoPE interleaving: a whole model, decoded, equals its full pass."""
    from llmlib.ffn import SwiGLU
    from llmlib.model import CausalLM, Layer, ModelConfig, spec

    local, everywhere, bare = ({"rope_theta": 1e4, "window": 4}, {"rope_theta": 1e6}, {})
    layers = tuple(
        Layer(spec(Attention, num_heads=4, num_kv_heads=2, **options), spec(SwiGLU, d_ff=48))
        for options in (local, local, everywhere, local, bare)
    )
    model = CausalLM(ModelConfig(vocab_size=60, d_model=32, layers=layers, norm=spec(RMSNorm), init_std=0.3)).double()
    tokens, state = torch.randint(0, 60, (2, 17)), model.new_state()
    with torch.no_grad():
        want = model(tokens)
        got = torch.cat([model(part, state) for part in tokens.split([6, 1, 1, 5, 1, 1, 1, 1], 1)], 1)
    assert torch.allclose(got, want, atol=1e-5)
    assert [s["k"].shape[2] for s in state] == [4, 4, 24, 4, 24]
    x = torch.randn(1, 17, 32, requires_grad=True, **double)  # a window of w reaches w − 1 further back in each layer
    y = x
    for block in model.layers[:2]:
        y = block(y)
    seen = torch.autograd.grad(y[0, 12].sum(), x)[0][0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == list(range(12 - 2 * 3, 13))


def test_what_caches_hold():
    x = torch.randn(2, 40, 32)
    growing, ring, int8 = {}, {}, {}
    with torch.no_grad():
        Attention(32, num_heads=4, num_kv_heads=2)(x, growing)
        Attention(32, num_heads=4, num_kv_heads=2, cache="int8")(x, int8)
        layer = Attention(32, num_heads=4, num_kv_heads=2, window=6)
        sizes = [cache_bytes(ring)]
        for _ in range(3):
            layer(x, ring)
            sizes.append(cache_bytes(ring))
    tokens, width = 2 * 40, 2 * 2 * 8
    assert cache_bytes(growing) == tokens * width * 4
    assert cache_bytes(int8) == tokens * (width + 2 * 2 * 4)
    assert sizes == [0, *[2 * 6 * width * 4] * 3]  # whatever the text's length
    reserved = {"reserve": 64}
    layer = Attention(32, num_heads=4)
    layer(x, reserved)
    at = reserved["k"].data_ptr()
    for _ in range(24):
        layer(x[:, :1], reserved)
    assert reserved["k"].data_ptr() == at
    assert reserved["k"].shape[2] == 64


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(1, 64))
def test_eight_bits_are_off_by_half_a_step_at_most(size, width):
    x = size * torch.randn(1, 2, 3, width)
    values, scale = quantise(x)
    assert values.dtype is torch.int8
    assert ((values * scale - x).abs() <= 0.5001 * scale).all()
    assert torch.allclose((values * scale).abs().amax(-1), x.abs().amax(-1))
    assert not quantise(torch.zeros(1, 1, 1, 4))[0].any()


# --- surgery -------------------------------------------------------------------------------------------------------


def test_pooling_heads():
    layer, x = Attention(32, num_heads=4, rope_theta=1e4, bias=True), torch.randn(2, 7, 32)
    nn.init.normal_(layer.k_proj.bias)
    grouped = to_grouped(layer, 2)
    assert grouped.num_kv_heads == 2
    mean = layer.k_proj(x).view(2, 7, 2, 2, 8).mean(3)
    assert torch.allclose(grouped.k_proj(x), mean.flatten(2), atol=1e-6)
    assert torch.allclose(to_grouped(layer, 4)(x), layer(x), atol=1e-7)
    for name in ("k_proj", "v_proj"):  # heads that are equal already lose nothing
        for p in getattr(layer, name).parameters():
            p.data = (
                p.data.unflatten(0, (2, 2, 8))[:, :1].expand_as(p.data.unflatten(0, (2, 2, 8))).reshape(p.shape).clone()
            )
    assert torch.allclose(to_grouped(layer, 2)(x), layer(x), atol=1e-6)
    layer.v_proj.requires_grad_(False)
    grouped = to_grouped(layer, 2)
    assert [p.requires_grad for p in grouped.parameters()] == [p.requires_grad for p in layer.parameters()]
    with pytest.raises(ConfigError, match="4 key/value heads don't pool into 3"):
        to_grouped(layer, 3)
    assert layer.num_kv_heads == 4


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_qk_clip_brings_each_head_to_the_limit(num_kv_heads):
    layer = Attention(32, num_heads=4, num_kv_heads=num_kv_heads, rope_theta=1e4, bias=True).double()
    layer.reset_parameters(0.3)
    x = torch.randn(2, 9, 32, **double)
    before = max_logits(layer, x)
    limit, old = before.median().item(), layer.k_proj.weight.detach().clone()
    gamma = qk_clip_(layer, before, limit)
    assert torch.allclose(max_logits(layer, x), before * gamma)
    untouched = (gamma.view(num_kv_heads, -1) == 1).all(1)  # groups of keys in which no head was too large
    assert torch.equal((layer.k_proj.weight == old).view(num_kv_heads, -1).all(1), untouched)
    assert max_logits(layer, x).max().item() == pytest.approx(limit)
    assert (gamma == 1).any()
    assert (gamma < 1).any()
    with pytest.raises(ConfigError, match="QK-norm"):
        qk_clip_(Attention(32, num_heads=4, qk_norm=RMSNorm), torch.ones(4))


def test_largest_logits_are_the_visible_ones():
    layer, x = Attention(8, num_heads=2, window=2), 3 * torch.randn(1, 5, 8)
    layer.reset_parameters(1.0)
    q, k = (layer.q_proj(x).view(5, 2, 4), layer.k_proj(x).view(5, 2, 4))
    for h, got in enumerate(max_logits(layer, x)):
        want = max((q[i, h] @ k[j, h] / 2).item() for i in range(5) for j in range(max(0, i - 1), i + 1))
        assert got.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Attention(30, num_heads=4), "d_model = 30 doesn't divide into num_heads = 4"),
        (lambda: Attention(32, num_heads=0), "num_heads is 0"),
        (lambda: Attention(32, num_heads=4, num_kv_heads=3), "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        (lambda: Attention(32, num_heads=4, num_kv_heads=0), "num_kv_heads is 0"),
        (lambda: Attention(32, num_heads=4, window=0), "window is 0"),
        *[
            (lambda name=name, value=value: Attention(32, **{"num_heads": 4, "rope_theta": 1e4, name: value}),
             f"{name} is {value}, and must be")
            for name, value in [
                ("window", 2.5), ("window", True), ("num_heads", True), ("num_kv_heads", True),
                ("head_dim", 0), ("head_dim", -8), ("rope_dim", 0), ("d_out", 0), ("softcap", 0.0),
                ("softcap", math.nan), ("scale", math.nan), ("clip_qkv", 0.0), ("clip_qkv", -1.0),
            ]
        ],
        (lambda: CrossAttention(32, num_heads=4, d_memory=0), "d_memory is 0, and must be"),
        (lambda: Attention(32, num_heads=4, bias=("q_porj",)), "bias is .'q_porj',.; give True, False or a"),
        (lambda: Attention(32, num_heads=4, bias="q_proj"), "bias is 'q_proj'"),
        (lambda: Attention(32, num_heads=4, bias=1), "bias is 1; give True, False"),
        (lambda: Attention(32, num_heads=4, qk_norm_after_rope=True), "qk_norm is None"),
        (lambda: Attention(32, num_heads=4, qk_norm=RMSNorm, qk_norm_over="width", qk_norm_after_rope=True), "'width'"),
        (lambda: to_grouped(Attention(32, num_heads=4, kv_from="a"), 2), "kv_from is 'a'"),
        *[
            (lambda at=at, scaling=scaling: Attention(32, num_heads=4, rope_theta=1e4, rope_scaling=scaling)(
                torch.randn(1, 3, 32), None, Context(torch.tensor(at))), message)
            for at, message in [([-1, 0, 1], "a position is -1"), ([0, 1], "2 positions for 3 new tokens")]
            for scaling in (None, LONGROPE)
        ],
        (lambda: Attention(32, num_heads=4, rope_theta=1e4, rope_dim=5), "even"),
        (lambda: Attention(28, num_heads=4, rope_theta=1e4), "even"),
        (lambda: Attention(32, num_heads=4, rope_theta=1e4, rope_dim=10), "rope_dim = 10 is wider than head_dim = 8"),
        (lambda: Attention(32, num_heads=4, rope_scaling={"type": "linear", "factor": 2.0}), "without rope_theta"),
        (lambda: Attention(32, num_heads=4, gate="some"), "gate is 'some'"),
        (lambda: Attention(32, num_heads=4, cache="int4"), "cache is 'int4'; choose one of float, int8"),
        (lambda: Attention(32, num_heads=4, qk_norm_over="all"), "qk_norm_over is 'all'"),
        (lambda: Attention(32, num_heads=4, rope_theta=1e4, rope_scaling=LONGROPE, kv_name="a"), "can't share keys"),
        (lambda: Attention(32, num_heads=4, causal=False)(torch.randn(1, 2, 32), {}), "keeps no state"),
        (lambda: CrossAttention(32, num_heads=4)(torch.randn(1, 2, 32)), "needs context.memory"),
        (lambda: Attention(8, num_heads=2)(torch.randn(1, 3, 8), None, Context(valid=torch.ones(1, 2) > 0)), "covers"),
        (lambda: attention(torch.randn(1, 4, 3, 8), *[torch.randn(1, 3, 3, 8)] * 2), "4 query heads can't share 3"),
        (lambda: attention(torch.randn(1, 4, 3, 8), *[torch.randn(1, 2, 2, 8)] * 2), "at least 3 keys"),
        (lambda: attention(*[torch.randn(1, 4, 3, 8)] * 3, window=0), "window is 0"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
