"""Sparse attention: MoBA, NSA and DSA against loops written from their equations, and against dense attention."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlib import cost
from llmlib.attention import (
    DSA,
    MLA,
    NSA,
    Attention,
    MoBA,
    blocks_ended,
    cache_bytes,
    choose,
    index_scores,
    indexer_loss,
    selected_attention,
)
from llmlib.context import Context, positions_in_text
from llmlib.errors import ConfigError
from llmlib.ffn import SwiGLU
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.ops import kernels, metered

torch.set_num_threads(1)
double = {"dtype": torch.float64}
D, THETA = 32, 100.0
LATENT = {"num_heads": 4, "kv_latent_dim": 16, "head_dim": 12, "v_head_dim": 10, "d_rope": 4}
KINDS = {
    "moba": (MoBA, {"num_heads": 4, "num_kv_heads": 2, "block_size": 4, "top_k": 2, "rope_theta": THETA}),
    "moba, no positions": (MoBA, {"num_heads": 2, "head_dim": 8, "block_size": 3, "top_k": 3}),
    "nsa": (NSA, {"num_heads": 4, "num_kv_heads": 2, "compress_block": 4, "compress_stride": 2, "select_block": 4,
                  "num_selected": 4, "window": 3, "rope_theta": THETA}),
    "nsa, no overlap": (NSA, {"num_heads": 2, "head_dim": 8, "compress_block": 3, "compress_stride": 3,
                              "select_block": 3, "num_selected": 4, "window": 5}),
    "dsa": (DSA, LATENT | {"top_k": 5, "index_heads": 3, "index_dim": 6, "rope_theta": THETA}),
    "dsa, query latent": (DSA, LATENT | {"top_k": 3, "index_heads": 8, "index_dim": 4, "q_latent_dim": 24,
                                         "rope_interleaved": True}),
    "dsa, no positions": (DSA, LATENT | {"top_k": 4, "index_heads": 2, "index_dim": 6, "d_rope": 0}),
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, d_model=D, **options):
    torch.manual_seed(1)
    cls, known = KINDS[kind]
    layer = cls(d_model, **known | options).double()
    layer.reset_parameters(0.3)
    return layer


def text(t=25, b=2):
    return torch.randn(b, t, D, **double)


# --- the definitions, one query at a time -----------------------------------------------------------------------------


def turned(x, at, theta):
    """RoPE on one vector, split-half: pair i turns by at · theta^(−2i/d)."""
    if theta is None:
        return x
    d = len(x)
    angles = torch.tensor([at * theta ** (-2 * i / d) for i in range(d // 2)], **double)
    pairs = torch.complex(x[: d // 2], x[d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag])


def attend(q, keys, values, scale=None):
    """Softmax attention of one query over lists of keys and values; zeros over none."""
    if not keys:
        return torch.zeros_like(q), []
    scores = torch.stack([(q * k).sum() for k in keys]) * (len(q) ** -0.5 if scale is None else scale)
    p = scores.exp() / scores.exp().sum()
    return sum(w * v for w, v in zip(p, values, strict=True)), p.tolist()


def best(scores, k):
    """The k places with the largest scores, the earlier of equals first."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def moba(layer, x):
    """One text: s_i = q · mean of block i, for the blocks before the query's own, which is always read."""
    h, g, d, size, theta = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.block_size, THETA
    theta = theta if layer.rope else None
    t, y = len(x), torch.zeros(len(x), layer.num_heads, layer.head_dim, **double)
    q, k, v = (p(x).view(t, -1, d) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    for head in range(h):
        group = head // (h // g)
        keys = [turned(k[i, group], i, theta) for i in range(t)]
        for i in range(t):
            own, query = i // size, turned(q[i, head], i, theta)
            means = [sum(keys[j * size : (j + 1) * size]) / size for j in range(own)]
            blocks = [*best([(query * mean).sum().item() for mean in means], layer.top_k - 1), own]
            seen = [s for s in range(i + 1) if s // size in blocks]
            y[i, head] = attend(query, [keys[s] for s in seen], [v[s, group] for s in seen])[0]
    return layer.o_proj(y.flatten(1))


def summary(compressor, vectors):
    """W₂ gelu(W₁ [x + p]) of one block."""
    flat = torch.cat([v + p for v, p in zip(vectors, compressor.position, strict=True)])
    hidden = compressor.block_proj.weight @ flat
    return compressor.summary_proj.weight @ (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def nsa(layer, x):
    """One text: equations 5 to 12 of the paper; importance by the tokens that a summary and a block share."""
    t, h, g, d = len(x), layer.num_heads, layer.num_kv_heads, layer.head_dim
    size, stride, big, theta = layer.compress_block, layer.compress_stride, layer.select_block, THETA
    theta = theta if layer.rope else None
    q = layer.q_proj(x).view(t, h, d)
    k, v = layer.k_proj(x).view(t, 3, g, d), layer.v_proj(x).view(t, 3, g, d)
    gates, y = torch.sigmoid(layer.gate_proj(x)).view(t, 3, h), torch.zeros(t, h, d, **double)
    for group in range(g):
        starts = [s for s in range(0, t, stride) if s + size <= t]
        k_cmp = [turned(summary(layer.compress_k, k[s : s + size, 0, group]), s, theta) for s in starts]
        v_cmp = [summary(layer.compress_v, v[s : s + size, 0, group]) for s in starts]
        k_sel, k_win = ([turned(k[i, c, group], i, theta) for i in range(t)] for c in (1, 2))
        for i in range(t):
            heads, ended = range(group * (h // g), (group + 1) * (h // g)), sum(s + size <= i + 1 for s in starts)
            queries = {head: turned(q[i, head], i, theta) for head in heads}
            compressed = {head: attend(queries[head], k_cmp[:ended], v_cmp[:ended]) for head in heads}
            own, importance = i // big, []
            for j in range(i // big + 1):
                block = set(range(j * big, (j + 1) * big))
                shared = [len(block & set(range(s, s + size))) / stride for s in starts[:ended]]
                importance.append(sum(n * p for _, ps in compressed.values() for n, p in zip(shared, ps, strict=True)))
            fixed = {0, own, max(own - 1, 0)}
            free = [j for j in range(own + 1) if j not in fixed]
            most = best([importance[j] for j in free], layer.num_selected - len(fixed))
            blocks = fixed | {free[j] for j in most}
            seen = [s for s in range(i + 1) if s // big in blocks]
            near = range(max(0, i - layer.window + 1), i + 1)
            for head in heads:
                y_sel = attend(queries[head], [k_sel[s] for s in seen], [v[s, 1, group] for s in seen])[0]
                y_win = attend(queries[head], [k_win[s] for s in near], [v[s, 2, group] for s in near])[0]
                branches = compressed[head][0], y_sel, y_win
                y[i, head] = sum(gates[i, c, head] * branch for c, branch in enumerate(branches))
    return layer.o_proj(y.flatten(1))


def dsa_scores(layer, x, theta):
    """Each query's index scores of the tokens up to its own in one text, from equation 1."""
    source = x if layer.q_latent_dim is None else layer.q_a_norm(layer.q_a_proj(x))
    index, r = layer.indexer, layer.d_rope
    q = index.q_proj(source).view(len(x), index.num_heads, -1)
    k = F.layer_norm(index.k_proj(x), (index.head_dim,), index.k_norm.weight, index.k_norm.bias, 1e-6)
    w = index.weight_proj(x) / math.sqrt(index.num_heads * index.head_dim)
    rows = []
    for i in range(len(x)):
        scores = []
        for s in range(i + 1):
            key = torch.cat([turned(k[s, :r], s, theta), k[s, r:]])
            products = [torch.cat([turned(z[:r], i, theta), z[r:]]) @ key for z in q[i]]
            scores.append(sum(a.item() * max(0.0, p.item()) for a, p in zip(w[i], products, strict=True)))
        rows.append(scores)
    return rows


def dsa(layer, x):
    """One text: each query's MLA, given the chosen tokens alone; the whole MLA is tested in test_mla.py."""
    theta = None if layer.rope is None else layer.rope.theta
    q, k = (z[0] for z in layer.queries_keys(x[None]))
    _, v = layer._expand(layer._queries_latents(x[None], layer._query_source(x[None]), 0, None, Context())[1])
    y = torch.zeros(len(x), layer.num_heads, layer.v_head_dim, **double)
    for i, scores in enumerate(dsa_scores(layer, x, theta)):
        seen = best(scores, layer.top_k)
        for head in range(layer.num_heads):
            y[i, head] = attend(q[head, i], [k[head, s] for s in seen], [v[0, head, s] for s in seen], layer.scale)[0]
    return layer.o_proj(y.flatten(1))


ORACLES = {MoBA: moba, NSA: nsa, DSA: dsa}


@every_kind
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_it_equals_the_definition(kind, mode):
    layer, x = make(kind), text(23)
    with torch.no_grad():
        want = torch.stack([ORACLES[type(layer)](layer, row) for row in x])
        with kernels(mode):
            assert torch.allclose(layer(x), want, atol=1e-11 * want.abs().max().item(), rtol=0)
    assert want.abs().max() > 0.1


def test_importance_is_the_papers_double_sum():
    """Equation 9, its indices from 1: p_slc[j] = Σ_m Σ_n p_cmp[(l'/d) j − m − n]; what isn't there counts nothing."""
    layer = NSA(D, num_heads=2, num_kv_heads=1, compress_block=6, compress_stride=2, select_block=8, num_selected=4)
    length = 47
    p = torch.rand(1, 2, 1, blocks_ended(length, 6, 2), **double)
    both, importance = p.sum(1)[0, 0].tolist(), []
    for j in range(1, 7):
        places = [4 * j - m - n for m in range(4) for n in range(3)]
        importance.append(sum(both[i - 1] for i in places if 1 <= i <= len(both)))
    free = [1, 2, 3]  # of 6 blocks the first and the last two are fixed
    assert layer._choose(p, length)[0, 0, 0, 3].item() == max(free, key=lambda j: importance[j])


def test_selected_attention_reads_the_chosen_blocks_alone():
    q, (k, v) = torch.randn(1, 4, 5, 8, **double), torch.randn(2, 1, 2, 11, 8, **double)
    for c in (1, 2, 4):
        chosen = torch.stack([torch.randperm(4)[:2] for _ in range(c * 5)]).view(1, c, 5, 2)
        y = selected_attention(q, k, v, chosen, block_size=3)
        for head in range(4):
            for i in range(5):
                blocks = chosen[0, head // (4 // c), i].tolist()
                seen = [s for s in range(6 + i + 1) if s // 3 in blocks]
                want, _ = attend(q[0, head, i], [k[0, head // 2, s] for s in seen], [v[0, head // 2, s] for s in seen])
                assert torch.allclose(y[0, head, i], want, atol=1e-12)


def test_of_equal_scores_the_earlier_wins_whatever_the_number_of_queries():
    scores = torch.zeros(1, 1, 40, 40)
    chosen = choose(scores, 3, 1, 40)
    assert chosen[0, 0, 5:].sort(-1).values.tolist() == [[0, 1, 2]] * 35
    assert choose(scores[:, :, -1:], 3, 1, 40)[0, 0, 0].tolist() == [0, 1, 2]


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("top_k", [4, 99])
def test_it_equals_transformers_deepseek(yarn, top_k):
    from transformers import DeepseekV32Config
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as theirs

    scaling = {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
    rope = {"rope_type": "yarn", **scaling} if yarn else {"rope_type": "default"}
    config = DeepseekV32Config(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, v_head_dim=10,
        qk_rope_head_dim=4, qk_nope_head_dim=12, attn_implementation="eager", index_topk=top_k, index_head_dim=8,
        index_n_heads=16, rope_parameters={**rope, "rope_theta": 1e4}, max_position_embeddings=128,
    )  # fmt: skip
    module = theirs.DeepseekV32Attention(config, layer_idx=0)
    ours = DSA(D, **LATENT, q_latent_dim=24, top_k=top_k, index_heads=16, index_dim=8, rope_interleaved=True,
               rope_scaling={"type": "yarn", **scaling} if yarn else None)  # fmt: skip
    for p in module.parameters():
        nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.3)
    names = {"_with_mqa": "", "_layernorm": "_norm", "indexer.wq_b": "indexer.q_proj", "indexer.wk": "indexer.k_proj",
             "weights_proj": "weight_proj"}  # fmt: skip
    weights = {}
    for name, value in module.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    ours.load_state_dict(weights)
    x = torch.randn(2, 17, D)
    mask = torch.full((1, 1, 17, 17), -torch.inf).triu(1).expand(2, -1, -1, -1)
    want = module(x, theirs.DeepseekV32RotaryEmbedding(config)(x, torch.arange(17)[None]), mask)[0]
    assert torch.allclose(ours(x), want, atol=5e-5 * want.abs().max().item())


# --- dense attention is the limit -------------------------------------------------------------------------------------


def test_moba_that_chooses_every_block_is_attention():
    layer, x = make("moba", top_k=7), text(25)
    dense = Attention(D, num_heads=4, num_kv_heads=2, rope_theta=THETA).double()
    dense.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(x), dense(x), atol=1e-12)
    assert not torch.allclose(make("moba", top_k=6)(x), dense(x), atol=1e-3)


def test_dsa_that_chooses_every_token_is_mla():
    layer, x = make("dsa", top_k=25), text(25)
    dense = MLA(D, **LATENT, rope_theta=THETA).double()
    dense.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("indexer")})
    assert torch.allclose(layer(x), dense(x), atol=1e-12)
    assert not torch.allclose(make("dsa", top_k=24)(x), dense(x), atol=1e-6)


@pytest.mark.parametrize("branch", [1, 2])
def test_nsas_branches_alone_are_gated_attention(branch):
    """All blocks selected, or a window over the whole text, with the values of the other branches at 0."""
    layer, x = make("nsa", num_selected=7, window=25), text(25)
    dense = Attention(D, num_heads=4, num_kv_heads=2, rope_theta=THETA, gate="head").double()
    with torch.no_grad():
        values = layer.v_proj.weight.unflatten(0, (3, -1))
        values[[c for c in range(3) if c != branch]] = 0
        layer.compress_v.position.zero_()
        for name in ("q_proj", "o_proj"):
            getattr(dense, name).load_state_dict(getattr(layer, name).state_dict())
        for name in ("k_proj", "v_proj", "gate_proj"):
            getattr(dense, name).weight.copy_(getattr(layer, name).weight.unflatten(0, (3, -1))[branch])
    assert torch.allclose(layer(x), dense(x), atol=1e-12)


# --- causality, decoding, other texts in the batch --------------------------------------------------------------------


@every_kind
def test_no_query_sees_a_later_token(kind):
    layer, x = make(kind), text(24, b=1).requires_grad_()
    y = layer(x)
    for i in (0, 7, 16):
        (gradient,) = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen[i] and not seen[i + 1 :].any()
    for i in (5, 11, 18):  # a choice has no gradient, so what it looks at must be changed to be seen
        changed = x.detach().clone()
        changed[:, i:] += torch.randn(1, 24 - i, D, **double)
        assert torch.allclose(layer(changed)[:, :i], y[:, :i], atol=1e-11)
        assert not torch.allclose(layer(changed)[:, i], y[:, i], atol=1e-3)


@every_kind
@pytest.mark.parametrize("sizes", [[1] * 25, [25], [7, 1, 1, 9, 3, 4], [2, 23]], ids=str)
def test_pieces_of_any_length_equal_the_full_pass(kind, sizes):
    layer, x, state = make(kind), text(25), {"reserve": 25}
    with torch.no_grad():
        y = torch.cat([layer(part, state) for part in x.split(sizes, 1)], 1)
        assert torch.allclose(y, layer(x), atol=1e-11)
    assert state["length"] == 25


@pytest.mark.parametrize("kind", ["dsa", "dsa, query latent", "dsa, no positions"])
def test_dsa_in_prompts_of_different_lengths_and_documents(kind):
    layer, texts = make(kind), [text(12, b=1), text(7, b=1)]
    x = torch.cat([texts[0], torch.cat([text(5, b=1), texts[1]], 1)])
    valid = torch.arange(12) >= torch.tensor([[0], [5]])
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        state, out = {}, []
        for old, at in ((0, 8), (8, 9), (9, 12)):
            out.append(layer(x[:, old:at], state, Context(positions[:, old:at], valid[:, :at])))
        y = torch.cat(out, 1)
        assert torch.allclose(y[0], layer(texts[0])[0], atol=1e-11)
        assert torch.allclose(y[1, 5:], layer(texts[1])[0], atol=1e-11)
        documents = torch.tensor([[0] * 12 + [1] * 7])
        got = layer(torch.cat(texts, 1), None, Context(torch.cat([torch.arange(12), torch.arange(7)]), None, documents))
        assert torch.allclose(got, torch.cat([layer(one) for one in texts], 1), atol=1e-11)


@every_kind
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [[25], [1] * 25, [3, 1, 1, 9, 4, 1, 1, 5], [14, 11]], ids=str)
def test_each_text_of_a_padded_batch_is_what_it_is_alone(kind, sizes, mode):
    """Behind paddings that leave blocks and strides whole or cut them, and one that is longer than the first pieces."""
    layer, x, before = make(kind), text(25, b=6), (0, 1, 4, 7, 13, 24)
    valid = torch.arange(25) >= torch.tensor(before)[:, None]
    positions = positions_in_text(valid, None)
    with torch.no_grad(), kernels(mode):
        state, out, end = {"reserve": 25}, [], 0
        for part in x.split(sizes, 1):
            start, end = end, end + part.shape[1]
            out.append(layer(part, state, Context(positions[:, start:end], valid[:, :end])))
        y = torch.cat(out, 1)
        assert torch.allclose(y, layer(x, None, Context(positions, valid)), atol=1e-11)
        for row, n, one in zip(y, before, x, strict=True):
            assert torch.allclose(row[n:], layer(one[None, n:])[0], atol=1e-11), n


@every_kind
def test_positions_matter_by_their_differences_alone(kind):
    """Of a text, and of a padded one whose positions aren't given."""
    layer, x = make(kind), text(25)
    with torch.no_grad():
        want, state = layer(x), {}
        y = torch.cat([layer(part, state, Context(torch.arange(i, i + 5) + 7)) for i, part in zip(
            range(0, 25, 5), x.split(5, 1), strict=True)], 1)  # fmt: skip
        assert torch.allclose(y, want, atol=1e-10)
        valid = torch.arange(25).expand(2, -1) >= 6
        assert torch.allclose(layer(x, None, Context(None, valid))[:, 6:], layer(x[:, 6:]), atol=1e-10)


@every_kind
def test_padding_gives_no_gradient_and_finite_ones(kind):
    layer, x = make(kind), text(12).requires_grad_()
    valid = torch.arange(12) >= torch.tensor([[0], [5]])
    y = layer(x, None, Context(positions_in_text(valid, None), valid))
    (gradient,) = torch.autograd.grad((y * valid[..., None]).square().sum(), x)
    assert gradient.isfinite().all()
    assert torch.equal(gradient.abs().sum(-1) > 0, valid)


@every_kind
def test_prompts_of_different_lengths_are_continued_as_each_alone(kind):
    model = CausalLM(config_of(SPECS[kind]).replace(init_std=0.3)).double()
    prompts = [torch.randint(0, 50, (n,)).tolist() for n in (11, 3, 8)]
    for together, prompt in zip(model.generate(prompts, 12), prompts, strict=True):
        assert torch.equal(together, model.generate([prompt], 12)[0])


@pytest.mark.parametrize("kind", ["moba", "nsa"])
def test_blocks_need_a_row_for_each_text(kind):
    with pytest.raises(ConfigError, match="it can't take context.documents: give it one text in each row"):
        make(kind)(text(8), context=Context(documents=torch.ones(2, 8, dtype=torch.long)))


# --- gradients --------------------------------------------------------------------------------------------------------


def without_gradient(layer, loss):
    layer.zero_grad()
    loss.backward()
    return {name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()}


@every_kind
def test_gradients_reach_every_parameter(kind):
    layer = make(kind)
    loss = layer(text()).square().sum()
    extra = getattr(layer, "auxiliary_loss", None)
    assert not without_gradient(layer, loss if extra is None else loss + extra)


def test_a_choice_carries_no_gradient():
    """Of NSA's compressed keys only that branch's own output does; of DSA's indexer nothing but its own loss."""
    layer = make("nsa")
    with torch.no_grad():
        layer.v_proj.weight.unflatten(0, (3, -1))[0] = 0
        layer.compress_v.position.zero_()
    assert {"compress_k.position", "compress_k.block_proj.weight"} <= without_gradient(layer, layer(text()).sum())
    layer, x = make("dsa, query latent"), text().requires_grad_()
    indexer = {f"indexer.{name}" for name, _ in layer.indexer.named_parameters()}
    assert without_gradient(layer, layer(x.detach()).sum()) == indexer
    layer(x)
    rest = without_gradient(layer, layer.auxiliary_loss)
    assert rest == {name for name, _ in layer.named_parameters()} - indexer and x.grad is None


# --- the indexer's loss -----------------------------------------------------------------------------------------------


def test_index_scores_are_equation_one():
    q, k, w = torch.randn(1, 3, 4, 5, **double), torch.randn(1, 1, 6, 5, **double), torch.randn(1, 3, 4, **double)
    got = index_scores(q, k, w)
    for t in range(4):
        for s in range(6):
            want = sum(w[0, j, t] * max(0.0, (q[0, j, t] @ k[0, 0, s]).item()) for j in range(3))
            assert torch.allclose(got[0, 0, t, s], want, atol=1e-14)


def test_indexer_loss_is_the_kl_and_its_gradient_the_difference():
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    scores = torch.randn(1, 1, 4, 4, **double).masked_fill(~allowed, -torch.inf).requires_grad_()
    weights = torch.rand(1, 3, 4, 4, **double) * allowed
    weights = weights / weights.sum(-1, keepdim=True)
    p, q = weights.mean(1, keepdim=True), scores.softmax(-1)
    loss = indexer_loss(scores, weights)
    kl = [[a * math.log(a / b) for a, b in zip(*rows, strict=True) if a > 0]
          for rows in zip(p[0, 0].tolist(), q[0, 0].tolist(), strict=True)]  # fmt: skip
    assert loss.item() == pytest.approx(sum(map(sum, kl)) / 4)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.allclose(gradient, ((q - p) / 4).detach(), atol=1e-14)
    assert indexer_loss(p.log(), weights).item() == pytest.approx(0, abs=1e-12)


def test_the_layers_indexer_loss_is_over_what_it_chose():
    layer, x = make("dsa, query latent"), text(15, b=1)
    layer(x)
    q, k = (z[0] for z in layer.queries_keys(x))
    kl = []
    for i, scores in enumerate(dsa_scores(layer, x[0], layer.rope.theta)):
        seen = best(scores, layer.top_k)
        p = torch.stack([(k[h, seen] @ q[h, i] * layer.scale).softmax(0) for h in range(4)]).mean(0)
        kl.append((p * (p.log() - torch.tensor(scores, **double)[seen].log_softmax(0))).sum())
    assert torch.allclose(layer.auxiliary_loss, torch.stack(kl).mean(), atol=1e-12)


def test_the_indexer_learns_what_attention_looks_at():
    """The share of dense attention that lies on the chosen tokens grows as the indexer alone is trained."""
    layer, x = make("dsa", top_k=32, index_heads=8), text(32, b=4)

    def caught():
        with torch.no_grad():
            q, k = layer.queries_keys(x)
            weights = (q @ k.mT * layer.scale).masked_fill(torch.ones(32, 32).triu(1).bool(), -torch.inf).softmax(-1)
            index = index_scores(*layer.indexer(x, x, layer.rope(0, q, Context())))
            return weights.mean(1, keepdim=True).gather(-1, choose(index, 4, 1, 32))[:, :, 16:].sum(-1).mean().item()

    before, optimizer = caught(), torch.optim.Adam(layer.indexer.parameters(), 0.02)
    losses = []
    for _ in range(60):
        layer(x)
        optimizer.zero_grad()
        layer.auxiliary_loss.backward()
        optimizer.step()
        losses.append(layer.auxiliary_loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert caught() > before + 0.1


def test_padding_leaves_the_indexers_loss_finite():
    layer, x = make("dsa"), text(9)
    valid = torch.arange(9) >= torch.tensor([[0], [4]])
    layer(x, context=Context(valid=valid))
    layer.auxiliary_loss.backward()
    assert all(p.grad.isfinite().all() for p in layer.indexer.parameters())


def test_the_loss_is_left_by_training_alone_and_a_trained_layer_can_be_copied():
    layer, x = make("dsa"), text(6)
    layer(x)
    assert layer.auxiliary_loss > 0
    assert copy.deepcopy(layer).auxiliary_loss is None
    layer.eval()(x)
    assert layer.auxiliary_loss is None


# --- in a model, and what it costs ------------------------------------------------------------------------------------

SPECS = {kind: spec(KINDS[kind][0], **KINDS[kind][1]) for kind in KINDS}


def config_of(mixer, layers=2):
    return ModelConfig(
        vocab_size=50, d_model=D, norm=spec(RMSNorm), layers=(Layer(mixer, spec(SwiGLU, d_ff=48)),) * layers
    )


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_model(kind, dtype):
    config = config_of(SPECS[kind])
    assert ModelConfig.from_yaml(config.to_yaml()) == config
    model, tokens = CausalLM(config).to(dtype), torch.randint(0, 50, (2, 20))
    (model.loss(tokens) + model.auxiliary_loss()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.generate(tokens, 9).shape == (2, 29)


@every_kind
def test_cache_is_what_a_run_allocates(kind):
    config = config_of(SPECS[kind])
    model = CausalLM(config)
    state = model.new_state(reserve=29)
    with torch.no_grad():
        for time in (20, 9):  # without room reserved for 29 in every part, the second call would double it
            model(torch.zeros(3, time, dtype=torch.long), state)
    assert cost.cache(config, 29, 3, torch.float32) == cost.state_bytes(state) == sum(map(cache_bytes, state))


def test_cache_sizes():
    """Numbers per token: MoBA 2 g d; NSA 2 g d (1 + 1/stride); DSA the latent, the rotary key and the index key."""
    sizes = {"moba": 2 * 2 * 8, "nsa": 2 * 2 * 8 * (1 + 1 / 2), "dsa": 16 + 4 + 6}
    for kind, size in sizes.items():
        assert cost.cache_per_token(config_of(SPECS[kind], 1), 600) == size * 2
    # beyond that NSA's window holds 3 tokens, and 2 wait with their places for a block to end; 299 summaries
    assert cost.cache(config_of(SPECS["nsa"], 1), 600) == 2 * 2 * 8 * (600 + 299 + 3 + 2) * 2 + 2 * 8


def rows_of(state):
    """(tensor, head, slot) for each vector of floats in a state."""
    for part in state.values():
        if isinstance(part, dict):
            yield from rows_of(part)
        elif isinstance(part, torch.Tensor) and part.is_floating_point():
            yield from ((part, g, i) for g in range(part.shape[1]) for i in range(part.shape[2]))


def read_by_a_step(layer, x, context):
    """Bytes of the cache that a step looks at: change any, and what one of its ops gives changes."""
    state = {"reserve": context}
    layer(x[:, :context], state)

    def results():
        found = []

        def meter(op, args, kwargs):
            found.append(op.run(*args, **kwargs))
            return found[-1]

        with metered(meter):
            layer(x[:, context:], copy.deepcopy(state))
        return [y for y in found for y in (y if isinstance(y, tuple) else (y,))]

    usual, read = results(), 0
    for tensor, g, i in rows_of(state):
        kept = tensor[:, g, i].clone()
        for _ in range(9):  # a ReLU may hide a change
            tensor[:, g, i] = kept + torch.randn_like(kept)
            if moved := any(not torch.equal(a, b) for a, b in zip(usual, results(), strict=True)):
                break
        tensor[:, g, i] = kept
        read += kept.nbytes * moved
    return read


@every_kind
def test_a_step_reads_of_the_cache_what_it_chose(kind):
    """At the 36th token blocks of NSA end; its ring gives one slot away, and the places that wait are no floats."""
    config, x = config_of(SPECS[kind], 1), text(36, b=1)
    layer = CausalLM(config.replace(init_std=0.3)).double().layers[0].mixer
    with torch.no_grad():
        read, counted = read_by_a_step(layer, x, 35), cost.cache_read(config, 35, dtype=torch.float64)
    aside = {"nsa": 2 * 2 * 8 * 8 + 3 * 8, "nsa, no overlap": 2 * 2 * 8 * 8 + 2 * 8}.get(kind, 0)
    if kind == "moba":  # two heads share keys, and may choose the same block
        most = 2 * 35 * 8 + 2 * (2 * 4 + 3) * 8
        assert counted == 8 * most >= read >= counted - 8 * 2 * 4 * 8
    else:  # and DSA may have chosen the token itself
        assert read in (counted - aside, counted - 20 * 8 * kind.startswith("dsa"))
    assert counted < cost.cache(config, 35, dtype=torch.float64)
    assert cost.decode(config, 35, 3).cache_bytes == cost.cache_read(config, 35, 3) == 3 * cost.cache_read(config, 35)


@pytest.mark.parametrize(("time", "cached"), [(29, 0), (7, 0), (1, 28), (4, 21)])
def test_flops_count_the_pairs_that_are_read(time, cached):
    """Products with the weights, and 2 (d + e) for each pair and head, the pairs counted one by one."""
    places = range(cached, cached + time)

    def flops(kind):
        return cost.flops(config_of(SPECS[kind], 1), time, cached).mixer

    def chosen(i, size, n):
        blocks = [*range(i // size + 1)][-n:]  # any n blocks with the own one among them have as many tokens
        return sum(s // size in blocks for s in range(i + 1))

    pairs, blocks = sum(chosen(i, 4, 2) for i in places), (cached + time) // 4
    weights = D * (32 + 2 * 16 + 32)
    assert flops("moba") == 2 * time * weights + 2 * 4 * (16 * pairs + time * blocks * 8)

    selected, window = sum(chosen(i, 4, 4) for i in places), sum(min(3, i + 1) for i in places)
    compressed = sum(len([s for s in range(0, i + 1, 2) if s + 4 <= i + 1]) for i in places)
    new = len([s for s in range(0, cached + time, 2) if cached < s + 4 <= cached + time])
    summaries = new * 2 * 2 * (4 * 8 * 8 + 8 * 8)
    weights = D * (32 + 6 * 16 + 3 * 4 + 32)
    assert flops("nsa") == 2 * time * weights + 2 * summaries + 2 * 4 * 16 * (selected + window + compressed)

    dense = cost.flops(config_of(spec(MLA, **LATENT), 1), time, cached).mixer
    seen, all_pairs = sum(min(5, i + 1) for i in places), sum(i + 1 for i in places)
    absorbed = MLA(D, **LATENT)._absorbing_is_cheaper(time, cached + time)
    width = 16 + 4 + 16 + 4 if absorbed else 12 + 4 + 10
    indexer = 2 * time * D * (3 * 6 + 6 + 3) + 2 * 3 * all_pairs * (6 + 1)
    assert flops("dsa") == dense - 2 * 4 * width * (all_pairs - seen) + indexer


def test_unmasked_flops_count_whole_blocks():
    whole, masked = (cost.flops(config_of(SPECS["moba"], 1), 64, masked=m).mixer for m in (False, True))
    pairs = 64 * 2 * 4
    assert whole - masked == 2 * 4 * 16 * (pairs - sum(min(i // 4, 1) * 4 + i % 4 + 1 for i in range(64)))


# --- what can't be built ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("moba", {"block_size": 0}, "block_size is 0, and must be at least 1"),
        ("moba", {"top_k": 0}, "top_k is 0, and must be at least 1"),
        ("moba", {"num_kv_heads": 3}, "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        ("nsa", {"compress_stride": 3}, "compress_block = 4 and select_block = 4 must be multiples of compress_stride"),
        ("nsa", {"compress_stride": 0}, "compress_stride is 0"),
        ("moba", {"block_size": 2.5}, "block_size is 2.5, and must be a whole number"),
        ("nsa", {"select_block": 4.0}, "select_block is 4.0, and must be a whole number"),
        ("dsa", {"top_k": True}, "top_k is True, and must be a whole number"),
        ("nsa", {"select_block": 2}, "compress_block = 4 must be at most select_block = 2"),
        ("nsa", {"num_selected": 2}, "num_selected is 2, and 3 blocks are fixed"),
        ("nsa", {"window": 0}, "window is 0"),
        ("nsa", {"num_kv_heads": 3}, "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        ("dsa", {"top_k": 0}, "top_k is 0, and must be at least 1"),
        ("dsa", {"index_heads": 0}, "index_heads is 0"),
        ("dsa", {"index_dim": 3}, "index_dim = 3 must be at least d_rope = 4"),
        ("dsa", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
         "the indexer keeps turned keys"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        make(kind, **options)


def test_choices_must_fit_the_heads():
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(ConfigError, match="3 choices of blocks don't divide 4 query heads"):
        selected_attention(q, k, k, torch.zeros(1, 3, 3, 1, dtype=torch.long))


def test_a_state_of_another_layer_is_named():
    layer = NSA(32, num_heads=4, compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=4)
    with pytest.raises(ValueError, match="is it the state of another layer"):
        layer(torch.randn(1, 3, 32), {"h": torch.zeros(1, 4)})
