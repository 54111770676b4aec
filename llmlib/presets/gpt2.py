"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"): learned positions, LayerNorm,
biases everywhere, tanh-GELU, and a head tied to the embedding."""

from llmlib.attention import Attention
from llmlib.ffn import MLP
from llmlib.model import Layer, ModelConfig, spec
from llmlib.norm import LayerNorm
from llmlib.position import LearnedPosition
from llmlib.presets.registry import publish

SOURCE = "Radford et al. (2019), https://openai.com/index/better-language-models/"


def gpt2(
    d_model: int, num_layers: int, num_heads: int, vocab_size: int = 50257, max_seq_len: int = 1024
) -> ModelConfig:
    """GPT-2 of any size; the feed-forward is four times as wide as the model."""
    layer = Layer(
        mixer=spec(Attention, num_heads=num_heads, bias=True),
        ffn=spec(MLP, d_ff=4 * d_model, activation="gelu_tanh", bias=True),
    )
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, layers=num_layers * (layer,), norm=spec(LayerNorm, eps=1e-5),
        position=spec(LearnedPosition, max_positions=max_seq_len), tie_embeddings=True, max_seq_len=max_seq_len,
    )  # fmt: skip


for _name, _label, *_sizes in (
    ("gpt2", "124M", 768, 12, 12),
    ("gpt2-medium", "355M", 1024, 24, 16),
    ("gpt2-large", "774M", 1280, 36, 20),
    ("gpt2-xl", "1.5B", 1600, 48, 25),
):
    publish(_name, "gpt2", _label, 2019, SOURCE, lambda sizes=_sizes: gpt2(*sizes))
