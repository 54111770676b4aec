"""Two attention layers learn to repeat: the induction head, seen while it forms (chapter 01).

A text is a start token, then random tokens that begin to repeat after 8 to 20 of them. In the first round nothing can
be predicted; from then on everything can, by looking for the last place where the present token stood, and copying
what came after it.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmlib.attention import Attention, qk_clip_
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.notebook.looking import attention_weights, largest_logits

VOCAB, TIME, START = 64, 40, 0


def repeats(batch: int, generator: torch.Generator) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b"]]:
    """Texts (b t), and the period (b) after which each repeats."""
    period = torch.randint(8, 21, (batch,), generator=generator)
    text = torch.randint(1, VOCAB, (batch, TIME), generator=generator)
    text = text.gather(1, torch.arange(TIME) % period[:, None])
    return torch.cat([torch.full((batch, 1), START), text], 1), period


def repeated(period: Int[Tensor, "b"], time: int = TIME) -> Bool[Tensor, "b t"]:
    """At which positions the next token has a precedent: one full period has been read."""
    return torch.arange(time) > period[:, None]


def make_model(num_layers: int = 2, seed: int = 0, **options) -> CausalLM:
    """Attention layers and nothing else; `options` are Attention's."""
    torch.manual_seed(seed)
    options = {"num_heads": 2, "rope_theta": 10_000.0} | options
    layers = num_layers * (Layer(mixer=spec(Attention, **options)),)
    return CausalLM(ModelConfig(vocab_size=VOCAB, d_model=64, layers=layers, norm=spec(RMSNorm)))


@dataclass
class Log:
    """Measured every few steps: the loss (nats) where the next token is new and where it is a repeat, the best head's
    `scores` (sink and aside: in the last layer), and the largest logit of all."""

    steps: list[int] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    previous: list[float] = field(default_factory=list)
    induction: list[float] = field(default_factory=list)
    sink: list[float] = field(default_factory=list)
    aside: list[float] = field(default_factory=list)
    logit: list[float] = field(default_factory=list)


def train_on_repeats(
    model: CausalLM, steps: int, *, seed: int = 0, learning_rate: float = 3e-3, every: int = 20,
    clip: float | None = None,
) -> Log:  # fmt: skip
    """AdamW on the mean loss over all positions, with 50 steps of warm-up; `clip` is QK-clip's limit."""
    generator, log = torch.Generator().manual_seed(seed), Log()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 50)
        text, _ = repeats(32, generator)
        loss = model.loss(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if clip is not None:
            for layer, logits in zip(model.layers, largest_logits(model, text[:, :-1]), strict=True):
                qk_clip_(layer.mixer, logits, clip)
        if (step + 1) % every == 0:
            _measure(model, step + 1, log)
    return log


@torch.no_grad()
def _measure(model: CausalLM, step: int, log: Log) -> None:
    text, period = repeats(32, torch.Generator().manual_seed(10_000))
    losses = cross_entropy(model(text[:, :-1]).mT, text[:, 1:], reduction="none")
    again = repeated(period)
    log.steps.append(step)
    log.new.append(losses[~again].mean().item())
    log.repeated.append(losses[again].mean().item())
    found = scores(attention_weights(model, text[:, :-1]), period)
    log.previous.append(found["previous"].max().item())
    log.induction.append(found["induction"].max().item())
    log.logit.append(max(logits.max().item() for logits in largest_logits(model, text[:, :-1])))
    log.sink.append(found["sink"][-1].max().item())
    log.aside.append(found["aside"][-1].max().item())


def scores(weights: list[Float[Tensor, "b h t s"]], period: Int[Tensor, "b"]) -> dict[str, Float[Tensor, "layer h"]]:
    """Mean weight of each head: where the text repeats, on the token before (previous) and on the token after the last
    precedent (induction); where nothing has a precedent, on the start token (sink) and on no token (aside).
    """
    b, _, t, _ = weights[0].shape
    again, at, row = repeated(period, t), torch.arange(t), torch.arange(b)[:, None]
    w = torch.stack(weights)  # (layer b h t s); pick takes one key per query, then the mean over the queries chosen

    def pick(key, queries):
        return w[:, row, :, at, key.expand(b, t).clamp(min=0)][queries].mean(0)

    return {
        "previous": pick(at - 1, again),
        "induction": pick(at - period[:, None] + 1, again),
        "sink": pick(torch.zeros_like(at), ~again & (at > 3)),
        "aside": 1 - w.sum(-1).permute(1, 3, 0, 2)[~again & (at > 3)].mean(0),
    }
