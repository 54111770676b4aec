"""Mixture-of-experts layers against those of transformers, on random weights: what published checkpoints need."""

import importlib

import pytest
import torch
from torch import nn

from llmlib.ffn import MLP, ClampedSwiGLU, SwiGLU
from llmlib.model import spec
from llmlib.moe import MoE, TopKRouter

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

D, F, E, K = 32, 24, 8, 3
SWIGLU = spec(SwiGLU, d_ff=F)
SIZES = dict(hidden_size=D, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
DEEPSEEK = dict(n_routed_experts=E, n_shared_experts=2, moe_intermediate_size=F, num_experts_per_tok=K)
V3_ROUTER = dict(
    scoring="sigmoid", norm_topk_prob=True, correction_bias=True, n_group=4, topk_group=2, group_score="top2",
    routed_scaling_factor=2.5,
)  # fmt: skip
# family: (configuration class, its keywords, the layer's class, our options)
FAMILIES = {
    "mixtral": (
        "MixtralConfig", dict(intermediate_size=F, num_local_experts=E, num_experts_per_tok=K), "MixtralSparseMoeBlock",
        dict(expert=SWIGLU, router=spec(TopKRouter, scoring="softmax_of_top_k")),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig", dict(moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True),
        "Qwen3MoeSparseMoeBlock", dict(expert=SWIGLU, router=spec(TopKRouter, norm_topk_prob=True)),
    ),
    "olmoe": (
        "OlmoeConfig", dict(intermediate_size=F, num_experts=E, num_experts_per_tok=K), "OlmoeSparseMoeBlock",
        dict(expert=SWIGLU),
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(moe_intermediate_size=F, shared_expert_intermediate_size=40, num_experts=E, num_experts_per_tok=K),
        "Qwen2MoeSparseMoeBlock",
        dict(expert=SWIGLU, shared_expert=spec(SwiGLU, d_ff=40), shared_expert_gate=True),
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        dict(**DEEPSEEK, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
        "DeepseekV2Moe",
        dict(
            expert=SWIGLU, num_shared_experts=2,
            router=spec(TopKRouter, n_group=4, topk_group=2, routed_scaling_factor=16.0),
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3Config", dict(**DEEPSEEK, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5),
        "DeepseekV3MoE", dict(expert=SWIGLU, num_shared_experts=2, router=spec(TopKRouter, **V3_ROUTER)),
    ),
    "gpt_oss": (
        "GptOssConfig", dict(intermediate_size=F, num_local_experts=E, num_experts_per_tok=K), "GptOssMLP",
        dict(
            expert=spec(ClampedSwiGLU, d_ff=F, bias=True),
            router=spec(TopKRouter, scoring="softmax_of_top_k", bias=True),
        ),
    ),
    "granitemoe": (
        "GraniteMoeConfig", dict(intermediate_size=F, num_local_experts=E, num_experts_per_tok=K), "GraniteMoeMoE",
        dict(expert=SWIGLU, router=spec(TopKRouter, scoring="softmax_of_top_k")),
    ),
    "jamba": (
        "JambaConfig", dict(intermediate_size=F, num_experts=E, num_experts_per_tok=K), "JambaSparseMoeBlock",
        dict(expert=SWIGLU),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        dict(
            n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=F, moe_shared_expert_intermediate_size=40,
            n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, moe_latent_size=16,
        ),
        "NemotronHMoE",
        dict(
            expert=spec(MLP, d_ff=F, activation="relu2", bias=False), latent_size=16,
            shared_expert=spec(MLP, d_ff=40, activation="relu2", bias=False), router=spec(TopKRouter, **V3_ROUTER),
        ),
    ),
}  # fmt: skip


def build(family):
    """transformers' layer with random weights, and ours with the same."""
    config_class, keywords, layer_class, options = FAMILIES[family]
    config = getattr(transformers, config_class)(**SIZES, **keywords)
    config._experts_implementation = "eager"
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    theirs = getattr(module, layer_class)(config).eval()
    for tensor in theirs.state_dict().values():
        nn.init.normal_(tensor, 0, 0.3)
    ours = MoE(D, num_experts=E, top_k=K, **options).eval()
    ours.load_state_dict(rename(theirs.state_dict(), interleaved=family == "gpt_oss"))
    return theirs, ours


def rename(tensors, interleaved):
    """gate and up are one tensor there: stacked, or (gpt-oss) interleaved and transposed."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("gate.weight", "router.weight") if name.startswith("gate.") else name
        name = name.replace("gate.e_score", "router.e_score").replace("shared_expert.", "shared_experts.")
        name = name.replace("fc1_latent_proj", "latent_in_proj").replace("fc2_latent_proj", "latent_out_proj")
        if name.startswith("experts."):
            _, kind = name.split(".", 1)
            suffix = "bias" if kind.endswith("bias") else "weight"
            if interleaved and suffix == "weight":
                tensor = tensor.mT
            kind = kind.removesuffix("_bias")
            parts = {kind: tensor}
            if kind == "gate_up_proj":
                gate, up = (tensor[:, ::2], tensor[:, 1::2]) if interleaved else tensor.chunk(2, dim=1)
                parts = {"gate_proj": gate, "up_proj": up}
            renamed |= {f"experts.{part}.{suffix}": value.contiguous() for part, value in parts.items()}
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_equals_transformers(family):
    torch.manual_seed(0)
    theirs, ours = build(family)
    x = torch.randn(2, 17, D, requires_grad=True)
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    got = ours(x)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(got, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    weight = torch.randn_like(got)
    (a,) = torch.autograd.grad((expected * weight).sum(), x)
    (b,) = torch.autograd.grad((got * weight).sum(), x)
    torch.testing.assert_close(b, a, atol=1e-4 * a.abs().max().item(), rtol=0)


def test_every_parameter_finds_its_place():
    for family in FAMILIES:
        theirs, ours = build(family)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_load_balancing_loss_is_transformers_over_k():
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    torch.manual_seed(0)
    moe = MoE(D, num_experts=E, top_k=K, expert=SWIGLU, load_balance_alpha=1.0)
    moe.reset_parameters(std=0.5)
    moe(torch.randn(2, 9, D))
    theirs = load_balancing_loss_func((moe.statistics.logits,), E, K)
    torch.testing.assert_close(K * moe.auxiliary_loss, theirs)
