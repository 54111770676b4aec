"""What keeps experts busy: nothing, the load-balancing loss, or a bias (chapter 06).

The same small byte model trains three times on the standard library; only what balances its experts differs.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from llmlib.attention import Attention
from llmlib.data import Corpus, batch, evaluation_batches
from llmlib.ffn import SwiGLU
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.moe import MoE, TopKRouter, max_violation, statistics
from llmlib.norm import RMSNorm
from llmlib.train import History, train

BALANCED_BY = {
    "nothing": {},
    "the loss": {"load_balance_alpha": 0.01},
    "the bias": {"bias_update_rate": 0.01},
}


def sparse_model(balanced_by: str = "nothing", seed: int = 0, num_layers: int = 1, **options) -> CausalLM:
    """Layers of attention and of 8 experts, 2 for each token; `options` are MoE's."""
    torch.manual_seed(seed)
    router = spec(TopKRouter, scoring="sigmoid", norm_topk_prob=True, correction_bias=balanced_by == "the bias")
    ffn = {"num_experts": 8, "top_k": 2, "expert": spec(SwiGLU, d_ff=48), "router": router}
    layer = Layer(
        mixer=spec(Attention, num_heads=4, rope_theta=10_000.0),
        ffn=spec(MoE, **{**ffn, **BALANCED_BY[balanced_by], **options}),
    )
    return CausalLM(ModelConfig(vocab_size=256, d_model=48, layers=num_layers * (layer,), norm=spec(RMSNorm)))


def train_sparse(model: CausalLM, corpus: Corpus, steps: int = 300, seed: int = 0) -> History:
    """`steps` batches of 16 × 64 bytes. The bias's step falls to 0 as the learning rate does, so that it comes to rest:
    DeepSeek-V3 stops it, too, near the end of its training."""
    rates = [(moe, moe.bias_update_rate) for moe in model.modules() if isinstance(moe, MoE)]

    def draw(step: int):
        for moe, rate in rates:
            moe.bias_update_rate = rate * (1 - step / steps)
        return batch(corpus.train, 16, 64, seed=seed, step=step)

    return train(model, draw, steps=steps, learning_rate=3e-3, floor=0.0, progress=False)


@torch.no_grad()
def loads(model: CausalLM, corpus: Corpus, windows: int = 1024) -> dict[str, Int[Tensor, "E"]]:
    """How many rows of the validation text each expert of each layer got."""
    model.eval()
    total: dict[str, Tensor] = {}
    for one in evaluation_batches(corpus.validation, 32, 64, windows=windows):
        model(one.inputs)
        for name, s in statistics(model).items():
            total[name] = total.get(name, 0) + s.wanted
    return total


def worst_violation(model: CausalLM, corpus: Corpus) -> float:
    """The largest MaxVio of any layer on the validation text."""
    return max(max_violation(counts) for counts in loads(model, corpus).values())
