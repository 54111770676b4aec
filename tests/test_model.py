"""Specs, layers, configs and what they build, against formulas written out here and torch's own modules."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmlib.attention import MLA, NSA, Attention, CrossAttention, MoBA
from llmlib.context import Context
from llmlib.errors import ConfigError
from llmlib.ffn import MLP, SwiGLU
from llmlib.model import Block, CausalLM, Classifier, EncoderDecoder, Layer, ModelConfig, spec
from llmlib.norm import LayerNorm, RMSNorm
from llmlib.position import LearnedPosition
from llmlib.ssm import Mamba2

ATTENTION = spec(Attention, num_heads=4, rope_theta=10000.0)
FFN = spec(SwiGLU, d_ff=48)


def small(layers=None, **changes):
    layers = 2 * (Layer(mixer=ATTENTION, ffn=FFN),) if layers is None else layers
    return ModelConfig(vocab_size=61, d_model=32, norm=spec(RMSNorm), layers=layers).replace(**changes)


def tokens(b=2, t=11, seed=0):
    return torch.randint(0, 61, (b, t), generator=torch.Generator().manual_seed(seed))


def build(config, cls=CausalLM, **options):
    torch.manual_seed(1)
    model = cls(config, **options)
    for p in model.parameters():  # gains away from one and biases from zero, so that leaving one out shows
        if p.ndim == 1:
            nn.init.normal_(p, 1.0 if p.mean() > 0.5 else 0.0, 0.3)
    return model.double()


def test_spec_is_a_partial_with_equality_and_repr():
    assert spec(SwiGLU, d_ff=48) == FFN != spec(SwiGLU, d_ff=49)
    assert repr(FFN) == "spec(SwiGLU, d_ff=48)"
    assert hash(FFN) == hash(spec(SwiGLU, d_ff=48))
    assert FFN.replace(d_ff=8).options == {"d_ff": 8}
    assert FFN(32).gate_proj.weight.shape == (48, 32)


def test_an_unknown_option_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"Attention has no option 'num_head' \(did you mean 'num_heads'\?\)"):
        spec(Attention, num_head=4)
    with pytest.raises(ConfigError, match="ModelConfig has no field tied"):
        small(tied=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0, and must be a whole number above 0"),
        ({"d_model": 2.5}, "d_model is 2.5"),
        ({"layers": (3,)}, r"layers\[0\] is 3, and must be a Layer"),
        ({"norm": "rms"}, "norm is 'rms', and must be a spec"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        small(**change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "before"}, "placement is 'before'; choose one of pre, post, inside, sandwich"),
        ({"mixer": Attention}, "Layer.mixer is .* must be a spec"),
        ({"parallel": True, "mixer": ATTENTION}, "a parallel layer has a mixer, a feed-forward"),
        ({"parallel_norms": 3}, "parallel_norms is 3"),
    ],
)
def test_impossible_layers(options, message):
    with pytest.raises(ConfigError, match=message):
        Layer(**options)


def test_sizes_that_do_not_fit_name_the_layer():
    layers = (Layer(ATTENTION, FFN), Layer(spec(Attention, num_heads=5), FFN))
    with pytest.raises(ConfigError, match=r"layers\[1\]: .*5"):
        CausalLM(small(layers))


def zoo():
    norm = spec(LayerNorm, eps=1e-6)
    yield small()
    yield small(name="other", tie_embeddings=True, logit_softcap=30.0, logit_scale=0.5, embedding_scale=math.sqrt(32))
    yield small((Layer(ATTENTION, FFN, placement="sandwich"), Layer(ffn=FFN), Layer(mixer=ATTENTION, norm=norm)))
    yield small(2 * (Layer(ATTENTION.replace(qk_norm=spec(RMSNorm, eps=1e-4)), FFN, parallel=True, parallel_norms=2),))
    yield small(position=spec(LearnedPosition, max_positions=64), embedding_norm=norm, max_seq_len=64, final_norm=False)
    yield small((Layer(ATTENTION, FFN, shared="a"), Layer(ATTENTION, FFN), Layer(ATTENTION, FFN, shared="a")))
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64, "factor": 2.0}  # fmt: skip
    yield small(2 * (Layer(ATTENTION.replace(rope_scaling=longrope), FFN),))


ZOO = list(zoo())


@pytest.mark.parametrize("config", ZOO)
def test_yaml_round_trip(config):
    text = config.to_yaml()
    assert ModelConfig.from_yaml(text) == config
    assert "repeat: 2" in text or len(set(config.layers)) > 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("d_model", "d_modle"), "config has no key 'd_modle' .did you mean 'd_model'"),
        (("d_ff", "d_fff"), r"layers\[0\].ffn: SwiGLU has no option 'd_fff'"),
        (("ffn.SwiGLU", "ffn.SwiGLO"), "there is no component 'llmlib.ffn.SwiGLO'"),
        (("mixer:", "mixxer:"), r"layers\[0\] has no key 'mixxer'"),
        (("vocab_size: 61\n", ""), "config lacks vocab_size"),
        (("vocab_size: 61\n", "vocab_size: 61\nvocab_size: 62\n"), "has vocab_size twice"),
    ],
)
def test_yaml_mistakes_are_named(edit, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_yaml(small().to_yaml().replace(*edit))


def placements():
    """Each placement as its formula, written with the block's own parts."""
    return {
        "pre": lambda x, f, norm, post: x + f(norm(x)),
        "post": lambda x, f, norm, post: norm(x + f(x)),
        "inside": lambda x, f, norm, post: x + post(f(x)),
        "sandwich": lambda x, f, norm, post: x + post(f(norm(x))),
    }


@pytest.mark.parametrize("placement", list(placements()))
def test_placements_are_their_formulas(placement):
    torch.manual_seed(0)
    block = Block(Layer(ATTENTION, FFN, placement=placement), 32, spec(RMSNorm)).double()
    for p in block.parameters():
        nn.init.normal_(p, 0.5, 0.3)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    step = placements()[placement]
    y = step(x, block.mixer, block.mixer_norm, block.mixer_post_norm)
    y = step(y, block.ffn, block.ffn_norm, block.ffn_post_norm)
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norms", [1, 2])
def test_parallel_blocks_and_scales(norms):
    torch.manual_seed(0)
    layer = Layer(ATTENTION, FFN, parallel=True, parallel_norms=norms, residual_scale=0.7, skip_scale=1.3)
    block = Block(layer, 32, spec(LayerNorm)).double()
    nn.init.normal_(block.mixer_norm.weight, 1, 0.3)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    ffn_norm = block.mixer_norm if norms == 1 else block.ffn_norm
    y = 1.3 * x + 0.7 * (block.mixer(block.mixer_norm(x)) + block.ffn(ffn_norm(x)))
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)
    assert (block.ffn_norm is None) == (norms == 1)


def test_deepnorm_scales_the_stream():
    block = Block(Layer(ffn=FFN, placement="post", skip_scale=2.0), 32, spec(RMSNorm)).double()
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    torch.testing.assert_close(block(x), block.ffn_norm(2 * x + block.ffn(x)))


def test_pre_norm_block_equals_torchs_own_layer():
    """Torch's encoder layer with norm_first and a causal mask is the same function of the same weights."""
    layer = Layer(spec(Attention, num_heads=4, bias=True), spec(MLP, d_ff=64, activation="gelu", bias=True))
    torch.manual_seed(0)
    block = Block(layer, 32, spec(LayerNorm)).double().eval()
    theirs = nn.TransformerEncoderLayer(32, 4, 64, 0.0, F.gelu, norm_first=True, batch_first=True).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            nn.init.normal_(p, 0, 0.2)
        names = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
        for name, i in names.items():
            getattr(block.mixer, name).weight.copy_(theirs.self_attn.in_proj_weight.chunk(3)[i])
            getattr(block.mixer, name).bias.copy_(theirs.self_attn.in_proj_bias.chunk(3)[i])
        pairs = [
            (block.mixer.o_proj, theirs.self_attn.out_proj), (block.ffn.up_proj, theirs.linear1),
            (block.ffn.down_proj, theirs.linear2), (block.mixer_norm, theirs.norm1), (block.ffn_norm, theirs.norm2),
        ]  # fmt: skip
        for mine, other in pairs:
            mine.weight.copy_(other.weight)
            mine.bias.copy_(other.bias)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", ZOO)
def test_logits_are_causal_and_float32(config):
    model = CausalLM(config)
    x = tokens()
    before = model(x)
    assert before.shape == (2, 11, 61)
    assert before.dtype == torch.float32
    assert model.bfloat16()(x).dtype == torch.float32
    model = model.float()
    x[:, 7] = (x[:, 7] + 1) % 61
    after = model(x)
    before = model(tokens())
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax((0, 2)).min() > 1e-6


def test_head_scale_and_softcap():
    model = build(small(logit_scale=0.5, logit_softcap=3.0))
    hidden = model.hidden(tokens())
    raw = hidden @ model.head.weight.T
    torch.testing.assert_close(model(tokens()), (3 * torch.tanh(0.5 * raw / 3)).float())


def test_tied_head_and_embedding_scale():
    model = build(small(tie_embeddings=True, embedding_scale=3.0, layers=()))
    x = model.final_norm(3 * model.embedding.weight[tokens()])
    torch.testing.assert_close(model(tokens()), (x @ model.embedding.weight.T).float())
    assert model.num_parameters() == 61 * 32 + 32


def test_loss_is_the_cross_entropy_of_the_next_token():
    for config in (small(init_std=0.5), small(init_std=0.5, logit_softcap=5.0)):
        model = build(config)
        x = tokens()
        logp = model(x).double().log_softmax(-1)[:, :-1]
        expected = -logp.gather(-1, x[:, 1:, None]).mean()
        torch.testing.assert_close(model.loss(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_shared_layers_share_weights_and_not_state():
    shared = Layer(ATTENTION, FFN, shared="a")
    model = build(small((shared, Layer(ATTENTION, FFN), shared)))
    assert model.layers[0] is model.layers[2]
    one = build(small((Layer(ATTENTION, FFN),))).num_parameters() - build(small(())).num_parameters()
    assert model.num_parameters() == build(small(())).num_parameters() + 2 * one
    state = model.new_state()
    pieces = torch.cat([model(p, state) for p in tokens().split(4, dim=1)], 1)
    torch.testing.assert_close(pieces, model(tokens()), rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match=r"layers\[1\] shares weights as 'a'"):
        CausalLM(small((shared, Layer(ATTENTION, shared="a"))))


@pytest.mark.parametrize("config", ZOO)
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 6], [10, 1]])
def test_decoding_in_pieces_equals_the_full_forward(config, pieces):
    model = build(config)
    state = model.new_state()
    out = torch.cat([model(p, state) for p in tokens().split(pieces, dim=1)], 1)
    torch.testing.assert_close(out, model(tokens()), rtol=1e-6, atol=1e-6)
    assert state.length == 11


@pytest.mark.parametrize("config", ZOO)
def test_left_padding_changes_nothing(config):
    model = build(config)
    x = tokens(1, 7)
    padded = F.pad(x, (4, 0), value=5)
    valid = torch.arange(11)[None] >= 4
    torch.testing.assert_close(model(padded, valid=valid)[:, 4:], model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", ZOO)
def test_packed_documents_do_not_see_each_other(config):
    model = build(config)
    one, two = tokens(1, 5, seed=2), tokens(1, 8, seed=3)
    documents = torch.tensor([[0] * 5 + [1] * 8])
    packed = model(torch.cat([one, two], 1), documents=documents)
    torch.testing.assert_close(packed, torch.cat([model(one), model(two)], 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("position", [None, spec(LearnedPosition, max_positions=64)])
def test_packed_documents_behind_padding(position):
    model = build(small(position=position))
    one, two, pad = tokens(1, 5, seed=2), tokens(1, 8, seed=3), torch.zeros(1, 3, dtype=torch.long)
    want = torch.cat([model(one), model(two)], 1)
    for documents in ([0] * 8 + [1] * 8, [9] * 3 + [0] * 5 + [1] * 8):  # padding as part of the first, or by itself
        options = {"valid": torch.arange(16)[None] >= 3, "documents": torch.tensor([documents])}
        packed = model(torch.cat([pad, one, two], 1), **options)
        torch.testing.assert_close(packed[:, 3:], want, rtol=1e-6, atol=1e-6)


def test_a_seed_fixes_every_weight():
    """Whatever the layers' addresses in memory, by which a set would order them."""
    models, kept = [], []
    for _ in range(4):
        torch.manual_seed(7)
        models.append(CausalLM(small(6 * (Layer(ATTENTION, FFN),), init_std=0.05)))
        kept.append(torch.empty(len(kept) * 1000))  # moves what is allocated next
    for model in models[1:]:
        for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_residual_init_shrinks_what_writes_to_the_stream():
    torch.manual_seed(0)
    layers = 8 * (Layer(spec(Attention, num_heads=4), FFN),)
    model = CausalLM(small(layers, d_model=128, init_std=0.05))
    ratio = model.layers[3].mixer.o_proj.weight.std() / model.layers[3].mixer.q_proj.weight.std()
    assert ratio.item() == pytest.approx(1 / 4, rel=0.05)
    assert model.layers[3].mixer.q_proj.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
def test_classifier_reads_the_right_vector(pool):
    causal = pool == "last"
    layers = (Layer(ATTENTION.replace(causal=causal), FFN),)
    model = build(small(layers), Classifier, num_classes=3, pool=pool)
    x, valid = tokens(2, 9), torch.arange(9) >= torch.tensor([[0], [3]])
    out = model(x, valid)
    assert out.shape == (2, 3)
    torch.testing.assert_close(out[0], model(x[:1])[0])
    torch.testing.assert_close(out[1], model(x[1:, 3:])[0])
    with pytest.raises(ConfigError, match="num_classes is 1"):
        Classifier(small(), 1)
    with pytest.raises(ConfigError, match="pool is 'max'"):
        Classifier(small(), 2, pool="max")


def encoder_decoder():
    encoder = small((Layer(ATTENTION.replace(causal=False), FFN),))
    cross = spec(CrossAttention, num_heads=4)
    return encoder, small(2 * (Layer(ATTENTION, FFN, cross=cross),))


def test_encoder_decoder_sees_all_of_the_source_and_no_future_target():
    torch.manual_seed(0)
    model = EncoderDecoder(*encoder_decoder()).double()
    source, target = tokens(2, 6, seed=1), tokens(2, 5, seed=2)
    before = model(source, target)
    for i in range(6):
        changed = source.clone()
        changed[:, i] = (changed[:, i] + 1) % 61
        assert (model(changed, target) - before).abs().amax((0, 2)).min() > 1e-9
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 61
    torch.testing.assert_close(model(source, changed)[:, :3], before[:, :3])


def test_encoder_decoder_mistakes():
    encoder, decoder = encoder_decoder()
    with pytest.raises(ConfigError, match="no layer of the decoder has `cross`"):
        EncoderDecoder(encoder, encoder)
    with pytest.raises(ConfigError, match="d_model is 32 and the decoder's 64"):
        EncoderDecoder(encoder, decoder.replace(d_model=64))


def test_context_is_one_object_for_all_layers():
    seen = []

    class Spy(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.d_model = d_model

        def forward(self, x, state=None, context=None):
            seen.append(context)
            return x

    model = CausalLM(small(3 * (Layer(mixer=spec(Spy)),)))
    model(tokens())
    assert len(seen) == 3
    assert isinstance(seen[0], Context)
    assert seen[0] is seen[1] is seen[2]
    torch.testing.assert_close(seen[0].embeddings, model.embedding(tokens()))


def compile_and_compare():
    model = CausalLM(small())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


def test_compiles_without_a_graph_break():
    """In a process of its own: torch.compile can't look through the checks of annotations that conftest installs."""
    code = "from test_model import compile_and_compare; compile_and_compare()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


MIXERS = {
    "attention": ATTENTION,
    "ring": spec(Attention, num_heads=4, num_kv_heads=2, window=3),
    "MLA": spec(MLA, num_heads=4, kv_latent_dim=8, d_rope=4, head_dim=8),
    "MoBA": spec(MoBA, num_heads=4, block_size=4, top_k=2),
    "NSA": spec(
        NSA, num_heads=4, compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=8
    ),
    "Mamba-2": spec(Mamba2, head_dim=8),
}  # fmt: skip


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_a_batch_of_no_texts_has_no_logits(mixer):
    assert CausalLM(small((Layer(mixer, FFN),)))(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, 61)
