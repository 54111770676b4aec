"""Parameters of published mixtures, total and active, against transformers' models and the published labels."""

import pytest
import torch

from llmlib.attention import Attention
from llmlib.cost import decode, flops, parameters
from llmlib.ffn import SwiGLU
from llmlib.model import Layer, ModelConfig, spec
from llmlib.moe import MoE
from llmlib.norm import RMSNorm
from llmlib.presets import get

transformers = pytest.importorskip("transformers")

DEEPSEEK = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
# what the published config.json files say where transformers' defaults differ
REFERENCES = {
    "mixtral-8x7b": ("MixtralConfig", {}),
    "olmoe-1b-7b": ("OlmoeConfig", dict(intermediate_size=1024)),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", dict(num_hidden_layers=48, head_dim=128)),
    "gpt-oss-20b": ("GptOssConfig", dict(num_hidden_layers=24, num_local_experts=32)),
    "gpt-oss-120b": ("GptOssConfig", {}),
    "deepseek-v2": (
        "DeepseekV2Config",
        dict(
            **DEEPSEEK, hidden_size=5120, num_hidden_layers=60, num_attention_heads=128, num_key_value_heads=128,
            intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=2,
            num_experts_per_tok=6, first_k_dense_replace=1, n_group=8, topk_group=3,
        ),
    ),
    "deepseek-v3": ("DeepseekV3Config", {}),
}  # fmt: skip
# billions: total, active, and what the publisher's active count leaves out: see llmlib/presets/moe.py
LABELS = {
    "mixtral-8x7b": (46.7, 12.9, ()),
    "mixtral-8x22b": (141, 39, ()),
    "olmoe-1b-7b": (6.9, 1.3, ()),
    "qwen3-30b-a3b": (30.5, 3.3, ()),
    "qwen3-235b-a22b": (235, 22, ()),
    "gpt-oss-20b": (20.91, 3.61, ("embedding",)),
    "gpt-oss-120b": (116.83, 5.13, ("embedding",)),
    "deepseek-v2": (236, 21, ()),
    "deepseek-v3": (671, 36.6, ("embedding",)),
}


def reference_counts(name):
    """Total and active: from transformers' model, of whose expert stacks a token uses k/E."""
    cls, keywords = REFERENCES[name]
    config = getattr(transformers, cls)(**keywords)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    experts = {n: p for n, p in model.named_parameters() if ".experts." in n}
    idle = sum(p.numel() // len(p) * (len(p) - config.num_experts_per_tok) for p in experts.values())
    return total, total - idle


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_counts_equal_transformers(name):
    config = get(name)
    assert (parameters(config).total, parameters(config, active=True).total) == reference_counts(name)


@pytest.mark.parametrize("name", LABELS)
def test_counts_round_to_the_published_labels(name):
    total, active, left_out = LABELS[name]
    counted = parameters(get(name)), parameters(get(name), active=True)
    ours = counted[0].total, counted[1].total - sum(getattr(counted[1], part) for part in left_out)
    for label, count in zip((total, active), ours, strict=True):
        assert fits(label, count), (label, count)


def fits(label: float, count: float) -> bool:
    """Rounded, or cut off after the last digit shown (gpt-oss-20b has 20.915 billion)."""
    step = 10.0 ** -len(str(label).partition(".")[2])
    return label - step / 2 <= count / 1e9 < label + step


@pytest.mark.parametrize("name", [name for name, (_, active, _) in LABELS.items() if active % 1])
def test_only_the_stated_convention_gives_the_published_active_count(name):
    """With the embedding where it was left out, or without it where it was counted, the label is missed."""
    _, active, left_out = LABELS[name]
    counted = parameters(get(name), active=True)
    other = counted.total if left_out else counted.total - counted.embedding
    assert not fits(active, other)


def test_flops_follow_the_active_parameters():
    """Of Mixtral's feed-forward, 2 FLOPs for each active weight and token."""
    config = get("mixtral-8x7b")
    active = parameters(config, active=True).ffn
    assert flops(config, time=16).ffn == 2 * 16 * active


def test_a_batch_of_decoding_reads_no_expert_twice():
    """Two mixtures, of which a batch of 3 uses up one, but not the other."""
    small, large = (
        Layer(ffn=spec(MoE, num_experts=n, top_k=2, expert=spec(SwiGLU, d_ff=8), num_shared_experts=1)) for n in (4, 16)
    )
    config = ModelConfig(
        vocab_size=50, d_model=16, norm=spec(RMSNorm), layers=(Layer(mixer=spec(Attention, num_heads=2)), small, large)
    )
    whole, expert = parameters(config), 3 * 16 * 8
    for batch, left in ((1, 2 + 14), (2, 12), (3, 10), (8, 0), (99, 0)):
        read = whole.total - whole.embedding + min(16 * batch, whole.embedding) - left * expert
        assert decode(config, 9, batch, torch.float32).weight_bytes == 4 * read
    assert parameters(config, active=True).total == whole.total - 16 * expert
