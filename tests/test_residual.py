"""Hyper-connections and mHC: the papers' equations number by number in float64, their tables, and what they promise."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmlib import cost
from llmlib.attention import Attention, CrossAttention
from llmlib.diagram import diagram, difference, outline
from llmlib.errors import ConfigError
from llmlib.ffn import MLP, SwiGLU
from llmlib.model import Block, CausalLM, Classifier, EncoderDecoder, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.ops import kernels
from llmlib.residual import HyperConnections, ManifoldHyperConnections, sinkhorn
from llmlib.train import parameter_groups

STATIC, DYNAMIC = spec(HyperConnections, streams=4, dynamic=False), spec(HyperConnections, streams=4)
MANIFOLD = spec(ManifoldHyperConnections, streams=4)
KINDS = [STATIC, DYNAMIC, MANIFOLD]
ATTENTION, FFN = spec(Attention, num_heads=4, rope_theta=10000.0), spec(SwiGLU, d_ff=48)
LAYER = Layer(ATTENTION, FFN)
kind = pytest.mark.parametrize("residual", KINDS, ids=["static", "dynamic", "manifold"])


def small(*layers, eps=0.0, **changes):
    layers = layers or 3 * (LAYER,)
    return ModelConfig(vocab_size=61, d_model=32, norm=spec(RMSNorm, eps=eps), layers=layers).replace(**changes)


def tokens(b=2, t=11, seed=0):
    return torch.randint(0, 61, (b, t), generator=torch.Generator().manual_seed(seed))


def stir(module, std=0.5):
    """Every number of a module's connections away from where it starts, in float64."""
    for part in module.modules():
        if isinstance(part, HyperConnections | ManifoldHyperConnections):
            for p in part.parameters():
                nn.init.normal_(p, 0, std)
    return module.double()


def streams(n=4, d=6, b=2, t=3):
    return torch.randn(b, t, n, d, dtype=torch.float64)


# --- the equations ----------------------------------------------------------------------------------------------------


def rms_normed(x: list[float]) -> list[float]:
    return [v / math.sqrt(sum(w * w for w in x) / len(x) + 1e-6) for v in x]


def hyper_connected(c, H, f):
    """Equations 1 to 13 of arXiv:2409.19606 for one token: H is n rows of d numbers, f works on one row."""
    n, d, fixed = len(H), len(H[0]), c.static.tolist()
    HC = [[0.0] + [fixed[j][0] for j in range(n)]] + [fixed[i][1:] for i in range(n)]  # equation 1
    if c.weight is not None:
        W, (s_beta, s_alpha) = c.weight.tolist(), c.scale.tolist()
        for i in range(n):
            row = rms_normed(H[i])
            reach = [math.tanh(sum(row[e] * W[e][j] for e in range(d))) for j in range(n + 2)]
            HC[0][1 + i] += s_beta * reach[0]
            for j in range(n + 1):
                HC[1 + i][j] += s_alpha * reach[1 + j]
    y = f([sum(HC[1 + i][0] * H[i][e] for i in range(n)) for e in range(d)])  # equation 3
    return [
        [HC[0][1 + j] * y[e] + sum(HC[1 + i][1 + j] * H[i][e] for i in range(n)) for e in range(d)] for j in range(n)
    ]


def doubly_stochastic(M, turns):
    """Equation 9 of arXiv:2512.24880, without logarithms: T_r(T_c(M)), from exp of the logits."""
    n = len(M)
    M = [[math.exp(v) for v in row] for row in M]
    for _ in range(turns):
        columns = [sum(M[i][j] for i in range(n)) for j in range(n)]
        M = [[M[i][j] / columns[j] for j in range(n)] for i in range(n)]
        M = [[v / sum(row) for v in row] for row in M]
    return M


def manifold_connected(c, H, f):
    """Equations 3, 7, 8 and 9 of arXiv:2512.24880 for one token."""
    n, d = len(H), len(H[0])
    x, phi, b = rms_normed([v for row in H for v in row]), c.weight.tolist(), c.static.tolist()
    reach = [sum(x[e] * phi[e][j] for e in range(n * d)) for j in range(n * n + 2 * n)]
    alpha = [a for a, k in zip(c.scale.tolist(), (n, n, n * n), strict=True) for _ in range(k)]
    logits = [a * r + v for a, r, v in zip(alpha, reach, b, strict=True)]
    pre = [1 / (1 + math.exp(-v)) for v in logits[:n]]
    post = [2 / (1 + math.exp(-v)) for v in logits[n : 2 * n]]
    res = doubly_stochastic([logits[2 * n + n * i : 2 * n + n * (i + 1)] for i in range(n)], c.iterations)
    y = f([sum(pre[i] * H[i][e] for i in range(n)) for e in range(d)])
    return [[sum(res[i][j] * H[j][e] for j in range(n)) + post[i] * y[e] for e in range(d)] for i in range(n)]


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize(
    ("residual", "equations"),
    [(STATIC, hyper_connected), (DYNAMIC, hyper_connected), (MANIFOLD.replace(iterations=7), manifold_connected)],
    ids=["static", "dynamic", "manifold"],
)
def test_the_papers_equations(residual, equations, n):
    connection = stir(residual.replace(streams=n)(6, 1))
    H = streams(n)
    u, kept, share = connection(H)
    mine = kept + share[..., None] * torch.sin(u)[..., None, :]
    for b in range(2):
        for t in range(3):
            expected = equations(connection, H[b, t].tolist(), lambda row: [math.sin(v) for v in row])
            torch.testing.assert_close(mine[b, t], torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layer", [LAYER, Layer(ATTENTION, FFN, parallel=True, residual_scale=0.7, skip_scale=1.3)])
def test_a_block_wraps_each_sublayer(layer):
    block = stir(Block(layer, 32, spec(RMSNorm), DYNAMIC))
    H = streams(4, 32)
    (pre, post, mix), f = block.mixer_residual.maps(H), lambda u: block.mixer(block.mixer_norm(u))
    if layer.parallel:
        f = lambda u: block.mixer(block.mixer_norm(u)) + block.ffn(block.mixer_norm(u))  # noqa: E731
    u = torch.einsum("btn,btnd->btd", pre, H)
    y = layer.skip_scale * torch.einsum("btmn,btnd->btmd", mix, H)
    y = y + layer.residual_scale * torch.einsum("btn,btd->btnd", post, f(u))
    if not layer.parallel:
        pre, post, mix = block.ffn_residual.maps(y)
        u = torch.einsum("btn,btnd->btd", pre, y)
        y = torch.einsum("btmn,btnd->btmd", mix, y) + torch.einsum("btn,btd->btnd", post, block.ffn(block.ffn_norm(u)))
    torch.testing.assert_close(block(H), y, rtol=1e-12, atol=1e-12)
    assert len(block.connections()) == (1 if layer.parallel else 2)


def test_mhc_equals_deepseek_v4s_own():
    """Theirs holds mix transposed, and an ε in each division, which is set to 0 here."""
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    config = DeepseekV4Config(hidden_size=6, hc_mult=4, hc_eps=0.0, rms_norm_eps=1e-6)
    theirs, mine = DeepseekV4HyperConnection(config), stir(MANIFOLD(6))
    order = [*range(8), *(8 + 4 * j + i for i in range(4) for j in range(4))]
    with torch.no_grad():
        theirs.fn.copy_(mine.weight.T[order])
        theirs.base.copy_(mine.static[order])
        theirs.scale.copy_(mine.scale)
    H = streams()
    post, mix, u = theirs(H)
    mine_u, kept, mine_post = mine(H)
    torch.testing.assert_close(mine_post.float(), post.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine_u.float(), u.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept.float(), (mix.mT.double() @ H).float(), rtol=1e-5, atol=1e-6)


# --- how they start ---------------------------------------------------------------------------------------------------


def started_from(base, residual, cls=CausalLM):
    """A model with connections as they start and the other weights of `base`."""
    model = cls(base.config.replace(residual=residual)).to(base.embedding.weight.dtype)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    assert all("_residual." in name for name in missing)
    return model


LAYERS = {
    "pre": LAYER,
    "post": Layer(ATTENTION, FFN, placement="post"),
    "inside": Layer(ATTENTION, FFN, placement="inside"),
    "sandwich": Layer(ATTENTION, FFN, placement="sandwich"),
    "parallel": Layer(ATTENTION, FFN, parallel=True, parallel_norms=2),
    "scaled": Layer(ATTENTION, FFN, residual_scale=0.7, skip_scale=1.3),
    "mixer alone": Layer(mixer=ATTENTION),
    "shared": Layer(ATTENTION, FFN, shared="a"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@kind
def test_it_starts_as_the_model_with_one_stream(residual, layer):
    """To the last bit, where all is additions of whole copies; σ and Sinkhorn's sums round."""
    base = CausalLM(small(layer, layer, layer))
    if residual.cls is HyperConnections:
        assert torch.equal(started_from(base, residual)(tokens()), base(tokens()))
    else:
        base = base.double()
        torch.testing.assert_close(
            started_from(base, residual).hidden(tokens()), base.hidden(tokens()), rtol=1e-6, atol=1e-6
        )


@kind
def test_without_the_final_norm_it_starts_n_times_as_large(residual):
    base = CausalLM(small(final_norm=False)).double()
    torch.testing.assert_close(started_from(base, residual).hidden(tokens()), 4 * base.hidden(tokens()))


def test_the_published_start():
    """Equation 14 of arXiv:2409.19606: B = 1, A_m = the (k mod n)-th column of the identity, A_r = I; s is 0.01."""
    model = CausalLM(small(residual=DYNAMIC))
    connections = [c for block in model.layers for c in block.connections()]
    for k, connection in enumerate(connections):
        pre, post, mix = connection.maps(streams(d=32))
        assert post.eq(1).all()
        assert torch.equal(mix[0, 0], torch.eye(4, dtype=torch.float64))
        assert pre[0, 0].tolist() == [float(i == k % 4) for i in range(4)]
        assert connection.scale.tolist() == pytest.approx([0.01, 0.01])
    assert len(connections) == 6


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_how_mhc_starts(n):
    for index in range(n):
        pre, post, mix = ManifoldHyperConnections(6, index, streams=n).maps(streams(n))
        assert post.eq(1).all()
        assert pre.sum(-1).mean().item() == pytest.approx(0.99 if n == 1 else 1, abs=1e-6)
        assert pre.argmax(-1).eq(index).all()
        assert mix.diagonal(dim1=-2, dim2=-1).mean().item() == pytest.approx(math.e**5 / (math.e**5 + n - 1), rel=1e-5)


@kind
def test_training_parts_the_streams(residual):
    """Equal streams with equal gradients would stay equal for ever: n streams that do the work of one."""
    model = CausalLM(small(residual=residual, eps=1e-6)).double()
    apart = []
    for _ in range(3):
        H = model.layers[0].mixer_residual.widen(model.embedding(tokens()))
        for block in model.layers:
            H = block(H)
        apart.append((H - H.mean(-2, keepdim=True)).norm().item() / H.norm().item())
        for p, g in zip(model.parameters(), torch.autograd.grad(model.loss(tokens()), model.parameters()), strict=True):
            p.data -= 0.3 * g
    assert apart[0] < 1e-14
    assert 1e-8 < apart[1] < apart[2]


def test_one_stream_is_the_ordinary_residual():
    """Hyper-connections: all three maps are 1 (equation 15). mHC: mix is 1 whatever is learned."""
    base = CausalLM(small(eps=1e-6))
    model = started_from(base, STATIC.replace(streams=1))
    assert torch.equal(model(tokens()), base(tokens()))
    assert stir(MANIFOLD.replace(streams=1)(6)).maps(streams(1))[2].eq(1).all()


# --- what mixing does to signals and gradients ------------------------------------------------------------------------


def test_mix_is_doubly_stochastic():
    """Rows to rounding; columns to what twenty turns leave, and less with more of them."""
    connection = stir(MANIFOLD(6))
    H, columns = streams(t=50), []
    for turns in (2, 20, 200):
        connection.iterations = turns
        mix = connection.maps(H)[2]
        assert mix.min() >= 0
        torch.testing.assert_close(mix.sum(-1), torch.ones(2, 50, 4, dtype=torch.float64), rtol=0, atol=1e-12)
        columns.append((mix.sum(-2) - 1).abs().max().item())
    assert columns[0] > 0.1 > columns[1] > 1e-3 > 1e-9 > columns[2]
    assert mix.std((0, 1)).min() > 1e-3  # it depends on the token


def test_sinkhorn_converges_by_the_second_singular_value_squared():
    logits = torch.randn(4, 4, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
    left = [(sinkhorn(logits, turns).sum(-2) - 1).norm() for turns in (20, 21)]
    second = torch.linalg.svdvals(sinkhorn(logits, 500))[1]
    assert (left[1] / left[0]).item() == pytest.approx(second.item() ** 2, rel=1e-3)


def test_sinkhorn_survives_logits_beyond_exp():
    logits = torch.tensor([[0.0, 500.0], [-500.0, 0.0]])
    assert sinkhorn(logits).isfinite().all()
    big = torch.randn(5, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(big + 700), sinkhorn(big), rtol=1e-10, atol=1e-10)


def passes(residual, depth=48):
    """(the product of `depth` mixing matrices, how much longer H is behind them, the gradient of its sum).

    Every number is 0.3 · N(0, 1) from where it starts, so hyper-connections mix by the identity and some noise.
    """
    H0 = H = streams(t=1, b=1).requires_grad_()
    product = torch.eye(4, dtype=torch.float64)
    for k in range(depth):
        connection = residual(6, k).double()
        for p in connection.parameters():
            p.data += 0.3 * torch.randn_like(p)
        product = connection.maps(H)[2].reshape(4, 4) @ product
        H = connection(H)[1]
    (gradient,) = torch.autograd.grad(H.sum(), H0)
    return product, (H.norm() / H0.norm()).item(), gradient


def test_mhc_keeps_signals_and_gradients_in_bounds():
    """A product of doubly stochastic matrices is one, of spectral norm 1; the sum of the streams passes as it is."""
    product, signal, gradient = passes(MANIFOLD)
    one = torch.ones(4, dtype=torch.float64)
    assert product.min() >= 0
    torch.testing.assert_close(product.sum(-1), one, rtol=0, atol=1e-12)
    torch.testing.assert_close(product.sum(-2), one, rtol=0, atol=0.1)  # twenty turns leave the columns a little off
    assert torch.linalg.matrix_norm(product, 2) < 1.01
    assert signal < 1.01
    torch.testing.assert_close(gradient, torch.ones_like(gradient), rtol=0, atol=0.1)


@pytest.mark.parametrize("residual", [STATIC, DYNAMIC])
def test_hyper_connections_do_not(residual):
    product, signal, gradient = passes(residual)
    assert torch.linalg.matrix_norm(product, 2) > 10
    assert signal > 10
    assert gradient.abs().max() > 5


@kind
def test_gradients_reach_every_number(residual):
    model = stir(CausalLM(small(residual=residual, eps=1e-6)))
    model.loss(tokens()).backward()
    for name, p in model.named_parameters():
        idle = name.endswith("embedding.weight")  # tokens that don't occur
        assert p.grad.count_nonzero() == p.numel() or idle, name


# --- inside models ----------------------------------------------------------------------------------------------------

ZOO = [(LAYER, layer, LAYER) for layer in LAYERS.values()]


@pytest.mark.parametrize("layers", ZOO, ids=LAYERS.keys())
@kind
def test_decoding_in_pieces_equals_the_full_forward(residual, layers):
    model = stir(CausalLM(small(*layers, residual=residual, eps=1e-6)))
    state = model.new_state()
    out = torch.cat([model(p, state) for p in tokens().split([4, 1, 6], dim=1)], 1)
    torch.testing.assert_close(out, model(tokens()), rtol=1e-6, atol=1e-6)


@kind
def test_it_is_causal_and_a_batch_changes_nothing(residual):
    model = stir(CausalLM(small(residual=residual, eps=1e-6)))
    before, x = model(tokens()), tokens()
    x[:, 7] = (x[:, 7] + 1) % 61
    after = model(x)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert (after - before)[:, 7:].abs().amax((0, 2)).min() > 1e-6
    torch.testing.assert_close(model(tokens()[1:]), before[1:], rtol=1e-6, atol=1e-6)
    assert model.bfloat16()(x).isfinite().all()


@kind
def test_maps_are_float32_in_a_bfloat16_model(residual):
    H = streams().bfloat16()
    connection = residual(6).bfloat16()
    assert {part.dtype for part in connection.maps(H)} == {torch.float32}
    assert {part.dtype for part in connection(H)} == {torch.bfloat16}


@kind
def test_encoders_cross_attention_and_classifiers(residual):
    encoder = small(Layer(ATTENTION.replace(causal=False), FFN), residual=residual)
    decoder = small(Layer(ATTENTION, FFN, cross=spec(CrossAttention, num_heads=4)), residual=residual)
    model = stir(EncoderDecoder(encoder, decoder))
    assert len(model.decoder.layers[0].connections()) == 3
    source, target = tokens(2, 6, seed=1), tokens(2, 5, seed=2)
    before = model(source, target)
    changed = source.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 61
    assert (model(changed, target) - before).abs().amax((0, 2)).min() > 1e-9
    state, memory = model.decoder.new_state(), model.encoder(source)
    pieces = [model.decoder(p, state, memory=memory) for p in target.split([2, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), before, rtol=1e-6, atol=1e-6)
    assert stir(Classifier(small(residual=residual), num_classes=3))(tokens()).shape == (2, 3)


def test_shared_layers_share_their_connections():
    shared = Layer(ATTENTION, FFN, shared="a")
    model = CausalLM(small(shared, LAYER, shared, residual=DYNAMIC))
    assert model.layers[0].mixer_residual is model.layers[2].mixer_residual
    assert cost.parameters(model.config).residual == 4 * (32 * 6 + 4 * 6 + 2)


def test_a_model_of_no_layers_has_one_stream():
    config = small(residual=DYNAMIC).replace(layers=())
    assert CausalLM(config)(tokens()).shape == (2, 11, 61)


@kind
def test_yaml_diagram_and_differences(residual):
    config = small(residual=residual)
    assert ModelConfig.from_yaml(config.to_yaml()) == config
    assert any(line.startswith(residual.cls.__name__) for line in outline(config))
    assert residual.cls.__name__ in str(diagram(config))
    assert ("residual", "—", str(residual)) in difference(small(), config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small(residual=HyperConnections), "residual is .* must be a spec, such as spec.HyperConnections"),
        (lambda: spec(HyperConnections, stream=4), "no option 'stream' .did you mean 'streams'"),
        (lambda: CausalLM(small(residual=DYNAMIC.replace(streams=0))), r"layers\[0\]: streams is 0, and must be"),
        (lambda: CausalLM(small(residual=MANIFOLD.replace(streams=2.5))), r"layers\[0\]: streams is 2.5"),
        (lambda: CausalLM(small(residual=MANIFOLD.replace(streams=True))), "streams is True"),
        (lambda: CausalLM(small(residual=MANIFOLD.replace(iterations=2.5))), "iterations is 2.5, and must be a whole"),
        (lambda: CausalLM(small(residual=MANIFOLD.replace(iterations=0))), "iterations is 0, and must be at least 1"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


# --- what they cost ---------------------------------------------------------------------------------------------------


def olmo(residual, d=2048, layers=16):
    block = Layer(spec(Attention, num_heads=d // 128), spec(MLP, d_ff=4 * d))
    return ModelConfig(50304, d, layers * (block,), spec(RMSNorm), residual=residual)


# Table 7 of arXiv:2409.19606, in billions: the total with hyper-connections less the total without.
TABLE_7 = [
    ((2048, 16), STATIC.replace(streams=2), 1.17676467 - 1.17676442),
    ((2048, 16), STATIC, 1.17676518 - 1.17676442),
    ((2048, 16), DYNAMIC.replace(streams=2), 1.17702688 - 1.17676442),
    ((2048, 16), DYNAMIC, 1.17715846 - 1.17676442),
    ((4096, 32), DYNAMIC, 6.88967027 - 6.88809574),
]


@pytest.mark.parametrize(("size", "residual", "published"), TABLE_7)
def test_parameters_of_the_published_models(size, residual, published):
    counted = cost.parameters(olmo(residual, *size))
    assert counted.residual == pytest.approx(published * 1e9, abs=11)
    assert counted.total - counted.residual == cost.parameters(olmo(None, *size)).total
    assert counted.total == cost.skeleton(olmo(residual, *size)).num_parameters()


def test_parameters_by_formula():
    """|θ| = d(n + 2) + n(n + 2) + 2 (equation 26 of arXiv:2409.19606's example); mHC: nd(n² + 2n) + n² + 2n + 3."""
    assert cost.parameters(olmo(DYNAMIC)).residual == 394_048
    n, d = 4, 2048
    assert cost.parameters(olmo(MANIFOLD)).residual == 32 * (n * d * (n**2 + 2 * n) + n**2 + 2 * n + 3)


@pytest.mark.parametrize(("n", "published"), [(2, 0.0010), (4, 0.0031)])
def test_flops_of_the_published_models(n, published):
    """Table 8, in GFLOPs for a token. The table counts the weighted sum with f's output too, 2nd, which isn't a product
    of matrices."""
    mixing = cost.flops(olmo(STATIC.replace(streams=n)), 1).residual
    assert mixing == 32 * 2 * 2048 * n * (n + 1)
    assert round((mixing + 32 * 2 * 2048 * n) / 1e9, 4) == published


@kind
def test_flops_equal_torchs_counter(residual):
    config = small(LAYER, LAYERS["parallel"], residual=residual)
    model, time = CausalLM(config).requires_grad_(False), 9  # torch's tracker trips over views of parameters
    with FlopCounterMode(display=False) as theirs, kernels("reference"), torch.no_grad():
        model(tokens(1, time))
    assert cost.flops(config, time, masked=False).total == theirs.get_total_flops()


def test_decoding_reads_the_connections_too():
    read = [cost.decode(small(residual=r), 5).weight_bytes for r in (None, DYNAMIC)]
    assert read[1] - read[0] == 2 * cost.parameters(small(residual=DYNAMIC)).residual


@kind
def test_weight_decay_spares_the_static_part(residual):
    """As section 4 of arXiv:2409.19606 has it."""
    model = CausalLM(small(residual=residual))
    decayed = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    for name, p in model.layers[0].mixer_residual.named_parameters():
        assert (id(p) in decayed) == (name == "weight")


def compile_and_compare():
    for residual in (DYNAMIC, MANIFOLD):
        model = CausalLM(small(residual=residual))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(tokens()), model(tokens()))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    """In a process of its own: torch.compile can't look through the checks of annotations that conftest installs."""
    code = "from test_residual import compile_and_compare; compile_and_compare()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
