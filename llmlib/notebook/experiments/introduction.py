"""The models of chapter 00: one that trains while the reader watches, and one small enough to run inside the page."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmlib.attention import Attention
from llmlib.ffn import SwiGLU
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm


def byte_model(d_model: int, num_layers: int, num_heads: int, d_ff: int, **options) -> ModelConfig:
    """A transformer of today over bytes: pre-norm, RMSNorm, rotary attention, SwiGLU; `options` are ModelConfig's."""
    layer = Layer(mixer=spec(Attention, num_heads=num_heads, rope_theta=10_000.0), ffn=spec(SwiGLU, d_ff=d_ff))
    return ModelConfig(vocab_size=256, d_model=d_model, layers=num_layers * (layer,), norm=spec(RMSNorm), **options)


def pocket() -> ModelConfig:
    """The model that the page carries: small enough to load with it, large enough to write something like Python."""
    return byte_model(64, 3, 4, 192, tie_embeddings=True, max_seq_len=256, name="pocket")


def quantise(weight: Float[Tensor, "rows columns"]) -> tuple[Int[Tensor, "rows columns"], Float[Tensor, "rows"]]:
    """Whole numbers −31…31 and one scale per row, with weight ≈ number · scale."""
    scale = weight.abs().amax(1).clamp(min=1e-12) / 31
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


@torch.no_grad()
def round_weights_(model: CausalLM) -> CausalLM:
    """Replace each matrix by what 6 bits keep of it, in place: then Python and the page have equal weights."""
    for weight in model.parameters():
        if weight.ndim == 2:
            whole, scale = quantise(weight)
            weight.copy_(whole * scale[:, None])
    return model
