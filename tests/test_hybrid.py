"""Hybrids are data: every kind of them as layers and as YAML, in pieces, in batches, packed; and Zamba2's own."""

import re

import pytest
import torch

from llmlib.attention import MLA, Attention
from llmlib.context import Context
from llmlib.errors import ConfigError
from llmlib.ffn import SwiGLU
from llmlib.hybrid import Identity, ParallelHeads, SharedBlock, WithSharedBlock
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.moe import MoE
from llmlib.norm import RMSNorm
from llmlib.ssm import GatedDeltaNet, Mamba, Mamba2, Mamba3

torch.set_num_threads(1)
D = 32
attention = spec(Attention, num_heads=4, num_kv_heads=2, rope_theta=1e4)
local = spec(Attention, num_heads=4, num_kv_heads=2, rope_theta=1e4, window=5)
mla = spec(MLA, num_heads=4, kv_latent_dim=16, head_dim=8, d_rope=4)
mamba, mamba2, mamba3 = (
    spec(Mamba, d_state=4),
    spec(Mamba2, head_dim=16, d_state=8),
    spec(Mamba3, head_dim=16, d_state=8),
)
delta = spec(GatedDeltaNet, num_heads=2, head_dim=8)
swiglu = spec(SwiGLU, d_ff=48)
moe = spec(MoE, num_experts=4, top_k=2, expert=swiglu, num_shared_experts=1, load_balance_alpha=0.01)
hymba = spec(ParallelHeads, mixers=(local, mamba), norm=spec(RMSNorm), output_scales=(0.5, 0.5))
falcon_h1 = spec(ParallelHeads, mixers=(attention, mamba2), input_scales=(1.0, 0.7), output_scales=(0.9, 0.4))
block = spec(
    SharedBlock,
    attention=spec(Attention, num_heads=4, rope_theta=1e4, scale=8**-0.5, d_out=D),
    norm=spec(RMSNorm),
    d_ff=40,
)


def zamba(name, **first):
    mixer = spec(
        WithSharedBlock, name=name, mixer=mamba2, norm=spec(RMSNorm), d_ff=40, adapter_rank=3, **first
    )  # fmt: skip
    return Layer(mixer=mixer, norm=spec(Identity))


KINDS = {
    "pure Mamba": 3 * (Layer(mamba),),
    "pure Mamba-2": 3 * (Layer(mamba2),),
    "pure Mamba-3": 3 * (Layer(mamba3, swiglu),),
    "attention and Mamba in turn": 2 * (Layer(attention, swiglu), Layer(mamba, swiglu)),
    "Jamba's one in eight": tuple(Layer(attention if i == 4 else mamba, moe if i % 2 else swiglu) for i in range(8)),
    "Mamba with local attention": 2 * (Layer(mamba, swiglu), Layer(local, swiglu)),
    "Mamba-2 and MLA": 2 * (Layer(mamba2, swiglu), Layer(mla, swiglu)),
    "Mamba-2, MLA and experts": 2 * (Layer(mamba2, moe), Layer(mla, moe)),
    "delta rule, three in four": (*3 * (Layer(delta, swiglu),), Layer(attention, moe)),
    "parallel heads, averaged": 2 * (Layer(hymba, swiglu),),
    "parallel heads, added": 2 * (Layer(falcon_h1, swiglu),),
    "one attention layer, shared": 2 * (Layer(mamba2), Layer(attention, swiglu, shared="a")),
    "Zamba2's shared blocks": (
        Layer(mamba2), zamba("a", block=block), zamba("b", block=block), Layer(mamba2), zamba("a"), zamba("b"),
    ),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def config(kind, **changes):
    return ModelConfig(vocab_size=50, d_model=D, layers=KINDS[kind], norm=spec(RMSNorm), **changes)


def build(kind):
    torch.manual_seed(0)
    model = CausalLM(config(kind, init_std=0.1)).double().eval()
    return model, torch.randint(50, (2, 14))


@kinds
def test_a_hybrid_is_yaml(kind):
    assert ModelConfig.from_yaml(config(kind).to_yaml()) == config(kind)


@kinds
def test_a_hybrid_decodes_in_pieces(kind):
    model, tokens = build(kind)
    expected, state = model(tokens), model.new_state()
    logits = torch.cat([model(piece, state) for piece in tokens.split([6, 1, 1, 3, 1, 2], 1)], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@kinds
def test_a_batch_of_prompts_of_different_lengths_is_each_alone(kind):
    model, tokens = build(kind)
    prompts = [tokens[0, :9].tolist(), tokens[1, :4].tolist()]
    together = model.generate(prompts, 5)
    alone = [model.generate(torch.tensor([p]), 5)[0] for p in prompts]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@kinds
def test_packed_documents_are_each_alone(kind):
    model, tokens = build(kind)
    documents = torch.tensor([[0] * 6 + [1] * 8]).expand(2, -1)
    expected = torch.cat([model(tokens[:, :6]), model(tokens[:, 6:])], 1)
    torch.testing.assert_close(model(tokens, documents=documents), expected, rtol=1e-9, atol=1e-9)


@kinds
def test_a_hybrid_learns(kind):
    model, tokens = build(kind)
    model.train()
    loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (loss + model.auxiliary_loss()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name in without if "experts" not in name]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.02 * p.grad
    after = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert after < loss


def test_shared_layers_hold_one_set_of_weights():
    model, _ = build("one attention layer, shared")
    assert model.layers[1] is model.layers[3] and model.layers[0] is not model.layers[2]
    model, _ = build("Zamba2's shared blocks")
    owners = [name for name, _ in model.named_parameters() if "block.attention.q_proj" in name]
    assert owners == [f"layers.{i}.mixer.block.attention.q_proj.weight" for i in (1, 2)]


def test_parallel_heads_add_what_their_mixers_give():
    torch.manual_seed(0)
    heads, x = falcon_h1(D), torch.randn(2, 7, D)
    attend, scan = heads.mixers
    torch.testing.assert_close(heads(x), 0.9 * attend(x) + 0.4 * scan(0.7 * x))
    averaged = hymba(D)
    parts = [norm(mixer(x)) for norm, mixer in zip(averaged.norms, averaged.mixers, strict=True)]
    torch.testing.assert_close(averaged(x), sum(parts) / 2)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ParallelHeads(D, mixers=(mamba,)), "need two mixers or more, and mixers has 1"),
        (
            lambda: ParallelHeads(D, mixers=(mamba, attention), output_scales=(1.0,)),
            "output_scales has 1 factors for 2 mixers",
        ),
        (
            lambda: WithSharedBlock(D, name="a", mixer=mamba, norm=RMSNorm, adapter_rank=2),
            "adapter_rank is 2, so d_ff",
        ),
        (
            lambda: SharedBlock(D, attention=attention, norm=RMSNorm, d_ff=8, activation="gello"),
            "activation is 'gello'",
        ),
        (
            lambda: run(zamba("a")),
            "no layer before this one has the shared block 'a'",
        ),
        (
            lambda: run(zamba("a", block=block), zamba("a", block=block)),
            "two layers give the shared block 'a' weights: give block= in the first of that name only",
        ),
        (
            lambda: run(zamba("a", block=spec(SharedBlock, **block.options | {"d_ff": 48}))),
            "d_ff is 40, and that of the shared block 'a' is 48: give the same",
        ),
        (
            lambda: run(zamba("a", block=grouped, attention_adapter=True)),
            "attention_adapter changes a k_proj as wide as its input, 64, and that of the shared block 'a' is 32 wide",
        ),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def run(*layers):
    return CausalLM(config("pure Mamba").replace(layers=layers))(torch.zeros(1, 1, dtype=torch.long))


grouped = spec(
    SharedBlock, attention=spec(Attention, num_heads=4, num_kv_heads=2, d_out=D), norm=spec(RMSNorm), d_ff=40
)


@kinds
def test_the_state_of_another_model_is_refused(kind):
    model, tokens = build(kind)
    for other in KINDS:
        state = build(other)[0].new_state()
        build(other)[0](tokens, state)
        if len(state) != len(model.layers) or shapes(state) != shapes(own_state(model, tokens)):
            with pytest.raises(ValueError, match="is it the state of another"):
                model(tokens[:, :1], state)
    with pytest.raises(ValueError, match="is it the state of another layer or another batch"):
        model(tokens[:1], own_state(model, tokens))


def own_state(model, tokens):
    state = model.new_state()
    model(tokens, state)
    return state


def shapes(state):
    if isinstance(state, torch.Tensor):
        return state.shape
    items = enumerate(state) if isinstance(state, list) else state.items()
    return {name: shapes(part) for name, part in items if isinstance(part, torch.Tensor | dict)}


def test_a_shared_block_needs_the_embeddings():
    layer = WithSharedBlock(D, name="a", block=block, mixer=mamba, norm=RMSNorm)
    with pytest.raises(ValueError, match="reads context.embeddings"):
        layer(torch.randn(1, 2, D))
    assert layer(torch.randn(1, 2, D), None, Context(embeddings=torch.randn(1, 2, D))).shape == (1, 2, D)


@pytest.mark.filterwarnings("ignore")
def test_shared_blocks_are_zamba2s():
    """Every number of a small Zamba2, whose two blocks take turns, is here under another name."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.Zamba2ForCausalLM(
        transformers.Zamba2Config(
            vocab_size=50, hidden_size=D, num_hidden_layers=6, intermediate_size=40, num_attention_heads=4,
            num_key_value_heads=4, n_mamba_heads=4, mamba_headdim=16, mamba_d_state=8, mamba_ngroups=1, adapter_rank=3,
            layers_block_type=["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid"], num_mem_blocks=2,
            use_mem_rope=True, use_shared_attention_adapter=False, pad_token_id=None, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    options = theirs.config
    mixer = spec(Mamba2, head_dim=16, d_state=8, dt_limit=(options.time_step_min, float("inf")))
    norm = spec(RMSNorm, eps=options.rms_norm_eps)
    wide = spec(Attention, num_heads=4, rope_theta=1e4, scale=8**-0.5, d_out=D)
    shared = spec(SharedBlock, attention=wide, norm=norm, d_ff=40)

    def hybrid(name, **first):
        mixed = spec(WithSharedBlock, name=name, mixer=mixer, norm=norm, d_ff=40, adapter_rank=3, **first)
        return Layer(mixed, norm=spec(Identity))

    plain = Layer(mixer)
    layers = plain, hybrid("a", block=shared), hybrid("b", block=shared), plain, hybrid("a"), hybrid("b")
    ours = CausalLM(ModelConfig(vocab_size=50, d_model=D, layers=layers, norm=norm, tie_embeddings=True)).eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    tokens = torch.randint(50, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-5)


# Zamba2's names and ours: the blocks belong to their first layers, the adapters to their uses, in layers 1, 2, 4 and 5
RENAMES = {
    r"model\.layers\.\d\.shared_transformer\.feed_forward\.gate_up_proj_adapter_list\.(\d)\.(\d)": (
        lambda found: f"layers.{(1, 2, 4, 5)[int(found[1])]}.mixer.adapter.{found[2]}"
    ),
    r"model\.layers\.([45])\.shared_transformer\..*": "twice",
    r"shared_transformer\.(feed_forward\.)?": "mixer.block.",
    r"block\.self_attn": "block.attention",
    r"block\.input_layernorm": "block.input_norm",
    r"pre_ff_layernorm": "ffn_norm",
    r"mamba_decoder\.input_layernorm": "mixer.norm",
    r"mamba_decoder\.mamba": "mixer.mixer",
    r"(\d\.)linear": r"\1mixer.linear",
    r"(\d\.)mamba": r"\1mixer",
    r"(\d\.)input_layernorm": r"\1mixer_norm",
    r"model\.embed_tokens": "embedding",
    r"model\.final_layernorm": "final_norm",
    r"^model\.": "",
}


def renamed(weights: dict) -> dict:
    out = {}
    for name, weight in weights.items():
        for pattern, replacement in RENAMES.items():
            name = re.sub(pattern, replacement, name)
        if not name.startswith(("twice", "lm_head")):
            out[name] = weight
    return out
