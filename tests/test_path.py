"""PaTH: against products of matrices written out, by what reflections do; decoding equals the full pass."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmlib import cost
from llmlib.attention import (
    Attention,
    PaTHAttention,
    attention,
    cache_bytes,
    path_attention,
    path_attention_recurrent,
    path_scores,
)
from llmlib.context import Context
from llmlib.errors import ConfigError
from llmlib.ffn import SwiGLU
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.ops import explain
from llmlib.position import rope

torch.set_num_threads(1)
double = {"dtype": torch.float64}


def inputs(b=2, h=4, g=2, t=9, d=4, e=3):
    """q, k, v, w of length 1, 0 < β < 2, and logarithms of gates."""
    q, k, v = torch.randn(b, h, t, d, **double), torch.randn(b, g, t, d, **double), torch.randn(b, g, t, e, **double)
    w, beta = F.normalize(torch.randn(b, g, t, d, **double), dim=-1), 2 * torch.rand(b, g, t, **double)
    return [q, k, v, w, beta, F.logsigmoid(torch.randn(b, h, t, **double))]


def product(w, beta, j, i):
    """H_i H_{i−1} ⋯ H_{j+1}, multiplied out."""
    H = torch.eye(w.shape[-1], **double)
    for s in range(j + 1, i + 1):
        H = (torch.eye(w.shape[-1], **double) - beta[s] * torch.outer(w[s], w[s])) @ H
    return H


def by_definition(q, k, v, w, beta, log_forget, mask, scale):
    """(y, keys) of one text, pair by pair."""
    (h, t, _), g = q.shape, k.shape[0]
    y = torch.zeros(h, t, v.shape[-1], **double)
    for head, i in itertools.product(range(h), range(t)):
        a, terms = head * g // h, []
        for j in range(i + 1):
            if mask[i, j]:
                score = scale * (q[head, i] @ product(w[a], beta[a], j, i) @ k[a, j]).item()
                forget = sum(log_forget[head, s].item() for s in range(j + 1, i + 1))
                terms.append((math.exp(score + forget), v[a, j]))
        total = sum(p for p, _ in terms)
        y[head, i] = sum((p / total * row for p, row in terms), torch.zeros(v.shape[-1], **double))
    keys = torch.stack([torch.stack([product(w[a], beta[a], j, t - 1) @ k[a, j] for j in range(t)]) for a in range(g)])
    return y, keys


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_op_is_its_definition(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    g, t, first = draw(st.sampled_from([1, 2])), draw(st.integers(1, 7)), draw(st.integers(0, 6))
    q, k, v, w, beta, log_forget = inputs(1, g * draw(st.sampled_from([1, 3])), g, t)
    log_forget = log_forget if draw(st.booleans()) else None
    mask = torch.rand(t, t) < (0.7 if draw(st.booleans()) else 2)
    gates = torch.zeros(1, q.shape[1], t, **double) if log_forget is None else log_forget
    want = by_definition(*(x[0] for x in (q, k, v, w, beta, gates)), mask, 0.6)
    options, first = {"scale": 0.6, "chunk_size": draw(st.integers(1, 8))}, min(first, t - 1)
    y, keys = path_attention(q, k, v, w, beta, log_forget, mask=mask, **options)
    assert torch.allclose(y[0], want[0], atol=1e-12)
    assert torch.allclose(keys[0], want[1], atol=1e-12)
    if first:  # the same in two pieces: the second takes the keys as the first returned them
        cut = [None if x is None else x[:, :, :first] for x in (q, k, v, w, beta, log_forget)]
        head, seen = path_attention(*cut, mask=mask[:first, :first], **options)
        q, w, beta = (x[:, :, first:] for x in (q, w, beta))
        k = torch.cat([seen, k[:, :, first:]], 2)
        tail, keys = path_attention(q, k, v, w, beta, log_forget, mask=mask[first:], **options)
        assert torch.allclose(torch.cat([head, tail], 2)[0], want[0], atol=1e-12)
        assert torch.allclose(keys[0], want[1], atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_token_by_token_is_all_at_once(gated):
    given = inputs(t=70)[: 6 if gated else 5]
    assert torch.allclose(path_attention_recurrent(*given), path_attention(*given)[0], atol=1e-12)


def test_scores_of_later_keys_are_zero_and_their_gradients_too():
    q, k, _, w, beta, _ = (x.requires_grad_() for x in inputs(b=1, h=1, g=1, t=6))
    scores, _ = path_scores(q, k, w, beta, chunk_size=4)
    assert not scores[0, 0].triu(1).any()
    assert not torch.autograd.grad(scores[0, 0, 2].sum(), k)[0][0, 0, 3:].any()


def test_without_beta_it_is_attention_without_positions():
    q, k, v, w, beta, _ = inputs()
    y, keys = path_attention(q, k, v, w, 0 * beta)
    assert torch.allclose(y, attention.reference(q, k, v), atol=1e-14)
    assert torch.equal(keys, k)
    layer, nope = PaTHAttention(32, num_heads=4, num_kv_heads=2), Attention(32, num_heads=4, num_kv_heads=2)
    nope.load_state_dict({name: p for name, p in layer.state_dict().items() if name[:2] in ("q_", "k_", "v_", "o_")})
    nn.init.constant_(layer.beta_proj.bias, -200.0)
    x = torch.randn(2, 9, 32)
    assert torch.allclose(layer(x), nope(x), atol=1e-7)


def test_a_forget_gate_alone_is_the_forgetting_transformer():
    q, k, v, w, beta, log_forget = inputs()
    since = log_forget.cumsum(-1)
    want = attention.reference(q, k, v, bias=since[..., None] - since[..., None, :])
    assert torch.allclose(path_attention(q, k, v, w, 0 * beta, log_forget)[0], want, atol=1e-13)


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_scores_depend_on_the_distance_where_tokens_repeat(period):
    def repeated(x):
        return x[:, :, torch.arange(20) % period]

    q, k, _, w, beta, _ = inputs(t=5)
    q, k = (x[:, :, :1].expand(-1, -1, 20, -1) for x in (q, k))
    scores, _ = path_scores(q, k, repeated(w), repeated(beta), chunk_size=8)
    assert torch.allclose(scores[..., period:, period:], scores[..., :-period, :-period], atol=1e-12)
    if period > 1:
        assert not torch.allclose(scores[..., 1:, 1:], scores[..., :-1, :-1], atol=1e-2)


def test_two_mirrors_are_a_turn_so_reflections_make_rope():
    """Mirrors at the angles 0 and φ, one after the other, turn their plane by 2φ; here in two planes."""
    phi, t = torch.tensor([0.3, 0.05], **double), 24
    q, k = torch.randn(1, 1, 1, 4, **double), torch.randn(1, 1, 1, 4, **double)
    w = torch.zeros(4, 4, **double)
    w[1, 0] = w[2, 2] = 1  # what follows token 0 comes first
    w[3, :2], w[0, 2:] = (torch.stack([angle.cos(), angle.sin()]) for angle in phi)
    beta = torch.full((1, 1, t), 2.0, **double)
    q, k = (x.expand(-1, -1, t, -1) for x in (q, k))
    scores, keys = path_scores(q, k, w.repeat(t // 4, 1)[None, None], beta)
    assert torch.allclose(keys.norm(dim=-1), k.norm(dim=-1))
    # four mirrors are one position of RoPE
    angles = 2 * phi * torch.arange(t // 4, **double)[:, None]
    turned = [rope(x[:, :, ::4], angles.cos(), -angles.sin(), interleaved=True) for x in (q, k)]
    want = (turned[0] @ turned[1].mT).tril()
    assert torch.allclose(scores[:, :, ::4, ::4], want, atol=1e-12)


def test_gradients_are_right():
    given = [x.requires_grad_() for x in inputs(b=1, h=2, g=1, t=5, d=3, e=2)]
    assert torch.autograd.gradcheck(lambda *x: path_attention(*x, chunk_size=2), given)
    q, k, v, w, beta, _ = given
    later = [x[:, :, 3:].detach().requires_grad_() for x in (q, w, beta)]
    assert torch.autograd.gradcheck(lambda q, w, beta: path_attention(q, k, v, w, beta), later)


# --- the layer -----------------------------------------------------------------------------------------------------

KINDS = {
    "mha": {},
    "gqa": {"num_kv_heads": 2, "head_dim": 6},
    "forget": {"num_kv_heads": 1, "forget_gate": True},
    "full rank": {"w_rank": None, "d_conv": 4, "num_kv_heads": 2, "forget_gate": True},
    "no convolution": {"d_conv": 1, "w_rank": 3},
}


def make(kind):
    torch.manual_seed(1)
    layer = PaTHAttention(32, num_heads=4, **KINDS[kind]).double()
    layer.reset_parameters(0.4)
    return layer


def in_pieces(layer, x, sizes, valid=None, documents=None):
    state, out, at = {}, [], 0
    for size in sizes:
        at += size
        context = Context(valid=None if valid is None else valid[:, :at],
                          documents=None if documents is None else documents[:, :at])  # fmt: skip
        out.append(layer(x[:, at - size : at], state, context))
    return torch.cat(out, 1)


def layer_by_definition(layer, x):
    """One text through the layer, its convolution and its gates written out."""
    heads = [layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)]
    u, (taps, width) = layer.w_proj(x), (layer.w_conv.weight[:, 0], layer.w_conv.weight.shape[-1])
    w = torch.stack([sum(u[i - o] * taps[:, width - 1 - o] for o in range(min(i + 1, width))) for i in range(len(x))])
    w = w * torch.sigmoid(w)
    q, k, v, w = (y.view(len(x), -1, layer.head_dim).transpose(0, 1) for y in (*heads, w))
    w = w / w.square().sum(-1, keepdim=True).sqrt()
    beta = 2 / (1 + torch.exp(-layer.beta_proj(x))).T
    forget = layer.forget_proj
    gates = torch.zeros(len(q), len(x), **double) if forget is None else torch.sigmoid(forget(x)).log().T
    mask = torch.ones(len(x), len(x), dtype=torch.bool)
    y, _ = by_definition(q, k, v, w, beta, gates, mask, layer.head_dim**-0.5)
    return layer.o_proj(y.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_its_definition(kind):
    layer, x = make(kind), torch.randn(8, 32, **double)
    with torch.no_grad():
        assert torch.allclose(layer(x[None])[0], layer_by_definition(layer, x), atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 23, [23], [5] * 4 + [3], [4, 1, 1, 6, 1, 10], [1, 1, 21]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_any_length_equal_the_full_pass(kind, sizes):
    layer, x = make(kind), torch.randn(2, 23, 32, **double)
    with torch.no_grad():
        assert torch.allclose(in_pieces(layer, x, sizes), layer(x), atol=1e-12)


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
            y = in_pieces(layer, x, sizes, valid)
            for row, n, text in zip(y, lengths, texts, strict=True):
                assert torch.allclose(row[9 - n :], layer(text)[0], atol=1e-11), (n, sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind):
    layer, x = make(kind), torch.randn(1, 20, 32, **double)
    documents = torch.tensor([[0] * 6 + [1] * 3 + [2] + [3] * 10])
    with torch.no_grad():
        want = torch.cat([layer(part) for part in x.split([6, 3, 1, 10], 1)], 1)
        for sizes in ([20], [4, 1, 1, 5] + [1] * 9):
            assert torch.allclose(in_pieces(layer, x, sizes, documents=documents), want, atol=1e-11)


def test_causality_by_gradient():
    layer, x = make("full rank"), torch.randn(1, 9, 32, requires_grad=True, **double)
    seen = torch.autograd.grad(layer(x)[0, 4].sum(), x)[0][0].abs().sum(-1) > 0
    assert seen.tolist() == [True] * 5 + [False] * 4
    q, k, v, w, beta, _ = inputs(b=1, h=1, g=1, t=6)
    w.requires_grad_()
    y, _ = path_attention(q, k, v, w, beta)
    moved = torch.autograd.grad(y[0, 0, 3].sum(), w)[0][0, 0].abs().sum(-1) > 0
    assert moved.tolist() == [False, True, True, True, False, False]  # the first has no key before it to turn


def swaps_layer():
    """Tokens 0 1 2: items. 3 4 5: swap the places 0 1, 0 2, 1 2. 6 7 8: which item is at place 0, 1, 2?

    An item's key and value are its unit vector, a question's query is its place's, and a swap mirrors along the
    difference of two places.
    """
    layer = PaTHAttention(9, num_heads=1, head_dim=3, w_rank=None, d_conv=1).double()
    up = 0.5
    for _ in range(100):  # silu(up) = −silu(−1)
        up = (1 + math.exp(-up)) / (1 + math.e)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.w_conv.weight.fill_(1)
        layer.beta_proj.bias.fill_(50)
        for token, (a, b) in zip((3, 4, 5), ((0, 1), (0, 2), (1, 2)), strict=True):
            layer.w_proj[0].weight[a, token], layer.w_proj[0].weight[b, token] = up, -1
        for i in range(3):
            layer.k_proj.weight[i, i] = layer.v_proj.weight[i, i] = layer.o_proj.weight[i, i] = 1
            layer.q_proj.weight[i, 6 + i] = 50
    return layer


def test_one_layer_tracks_swaps():
    layer, order = swaps_layer(), list(itertools.product((3, 4, 5), repeat=5))
    tokens = torch.tensor([[0, 1, 2, *swaps, question] for swaps in order for question in (6, 7, 8)])
    with torch.no_grad():
        answers = layer(F.one_hot(tokens, 9).double())[:, -1, :3]
    want = []
    for swaps in order:
        items = [0, 1, 2]
        for a, b in (((0, 1), (0, 2), (1, 2))[s - 3] for s in swaps):
            items[a], items[b] = items[b], items[a]
        want += items
    assert answers.argmax(-1).tolist() == want
    assert answers.amax(-1).min() > 0.99


def test_what_stands_between_moves_its_score_and_not_ropes():
    x = torch.randn(1, 6, 32, requires_grad=True, **double)
    layer, with_rope = make("mha"), Attention(32, num_heads=4, rope_theta=1e4).double()
    q, k = with_rope.queries_keys(x)
    q_path, k_path = (f(x).view(1, 6, 4, 8).transpose(1, 2) for f in (layer.q_proj, layer.k_proj))
    w, beta = layer._directions(x, None, Context()), 2 * torch.sigmoid(layer.beta_proj(x)).mT
    moved = []
    for scores in (q @ k.mT, path_scores(q_path, k_path, w, beta)[0]):
        (gradient,) = torch.autograd.grad(scores[0, :, 5, 1].sum(), x)
        moved.append((gradient[0].abs().sum(-1) > 0).tolist())
    assert moved[0] == [False, True, False, False, False, True]
    assert moved[1] == [True] * 6  # the first through the convolution of the third


def test_turned_keys_do_not_drift_in_bfloat16():
    torch.manual_seed(0)
    layer = PaTHAttention(32, num_heads=4).bfloat16()
    layer.reset_parameters(0.4)
    nn.init.constant_(layer.beta_proj.bias, 20.0)  # mirrors alone: no key fades
    x, state = torch.randn(1, 400, 32).bfloat16(), {}
    with torch.no_grad():
        y = torch.cat([layer(part, state) for part in x.split(1, 1)], 1)
        error = (y - layer(x)).double().norm() / y.double().norm()
    assert state["k"].dtype is torch.float32
    assert state["v"].dtype is torch.bfloat16
    assert error < 1e-2


def model(**options):
    mixer = spec(PaTHAttention, num_heads=4, num_kv_heads=2, **options)
    layers = (Layer(mixer, spec(SwiGLU, d_ff=48)),) * 2
    return ModelConfig(vocab_size=60, d_model=32, layers=layers, norm=spec(RMSNorm), init_std=0.3)


def test_a_whole_model_decodes_as_it_reads(capsys):
    lm, tokens = CausalLM(model(forget_gate=True)), torch.randint(0, 60, (2, 17))
    state = lm.new_state(reserve=32)
    with torch.no_grad():
        got = torch.cat([lm(part, state) for part in tokens.split([6, 1, 1, 5, 1, 1, 1, 1], 1)], 1)
        assert torch.allclose(got, lm(tokens), atol=1e-4)
    assert state[0]["k"].shape[2] == 32
    explain(lm, tokens)
    assert "path_attention: reference  × 2" in capsys.readouterr().out


def test_what_its_cache_holds():
    x, state = torch.randn(3, 20, 32), {}
    with torch.no_grad():
        PaTHAttention(32, num_heads=4, num_kv_heads=2, forget_gate=True)(x, state)
    assert cache_bytes(state) == 4 * 3 * (20 * (2 * 16 + 4) + 2 * 16)


@pytest.mark.parametrize("time", [5, 64])
def test_its_flops_are_those_of_its_products(time):
    """Torch counts all but the triangular systems: t² for each of the t keys and each key head."""
    config = model(forget_gate=True)
    with FlopCounterMode(display=False) as theirs, torch.no_grad():
        CausalLM(config)(torch.zeros(1, time, dtype=torch.long))
    assert cost.flops(config, time, masked=False).total == theirs.get_total_flops() + 2 * 2 * time**3
    hidden, heads = time * (time - 1) // 2, 4 * 2 * (8 + 8) + 4 * 2 * time + 2 * (4 * 8 + time)
    assert cost.flops(config, time).total == cost.flops(config, time, masked=False).total - 2 * hidden * heads


def test_flops_of_a_long_text_grow_with_its_square():
    long, longer = (cost.flops(model(), n).mixer for n in (2048, 4096))
    assert 3.5 < longer / long < 4


def swapped(i, x):
    return [*inputs()[:i], x, *inputs()[i + 1 :]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PaTHAttention(30, num_heads=4), "d_model = 30 doesn't divide into num_heads = 4"),
        (lambda: PaTHAttention(32, num_heads=4, num_kv_heads=3), "a multiple of num_kv_heads = 3"),
        (lambda: PaTHAttention(32, num_heads=4, w_rank=0), "w_rank is 0"),
        (lambda: PaTHAttention(32, num_heads=4, d_conv=0), "d_conv is 0"),
        (lambda: PaTHAttention(8, num_heads=2)(torch.randn(1, 3, 8), None, Context(valid=torch.ones(1, 2) > 0)), "cov"),
        (lambda: path_attention(*inputs()[:5], chunk_size=0), "chunk_size is 0"),
        (lambda: path_attention(*swapped(0, torch.randn(2, 3, 9, 4))), "3 query heads can't share 2"),
        (lambda: path_attention(*swapped(0, torch.randn(2, 4, 10, 4))), "at least 10 keys"),
        (lambda: path_attention(*swapped(3, torch.randn(2, 4, 9, 4))), r"w is \(2, 4, 9, 4\), and must be \(2, 2"),
        (lambda: path_attention(*swapped(4, torch.randn(2, 2, 8))), r"beta is \(2, 2, 8\), and must be \(2, 2, 9\)"),
        (lambda: path_attention(*swapped(5, torch.randn(2, 2, 9))), r"log_forget is \(2, 2, 9\), and must be \(2, 4"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
