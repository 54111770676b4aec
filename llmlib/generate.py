"""Sampling from anything that maps tokens and a state to logits."""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llmlib.errors import require, require_counts

_COLDEST = 1e-30  # float32 would overflow below; the draw has long been greedy


def sample(
    logits: Float[Tensor, "b v"],
    temperature: float = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b"]:
    """One token for each row of logits.

    temperature 0 takes the most likely token; otherwise the token is drawn from softmax(logits / temperature),
    cut to the `top_k` most likely tokens, then to the smallest set whose probability reaches `top_p`
    (nucleus sampling, arXiv 1904.09751). Ties at the k-th place all stay in. Nothing is checked here: `generate` does.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / max(temperature, _COLDEST)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(beyond.scatter(-1, index, beyond), 0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model,
    tokens: Int[Tensor, "b t"] | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | Collection[int] | None = None,
    stream: Callable[[Tensor], None] | None = None,
) -> Int[Tensor, "b total"] | list[Tensor]:
    """Continue each prompt by `max_new_tokens`, keeping the model's state so that each token is read once.

    model   has `new_state(reserve)`, `hidden(tokens, state, valid=…)`, `logits(hidden)`, `config.vocab_size`
            and may have `position.max_positions`, the length of a table of positions
    tokens  (b t), or a list of prompts of any lengths, which are padded on the left and come back as a list
    seed    the same seed draws the same for the same batch; the rows of a batch draw in turn from one source
    stop    a token that ends a sequence, or several; what follows one repeats it, and a list is cut after it
    stream  is called with each new column of tokens (b)
    Returns the prompts and what was added. Raises ConfigError for settings out of range and for unknown tokens.
    """
    device = next(model.parameters()).device
    prompts, valid = _prompts(tokens, device)
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, seed)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    b, t = prompts.shape
    out = torch.cat([prompts, prompts.new_zeros(b, max_new_tokens)], 1)
    state, was_training = model.new_state(t + max_new_tokens), model.training
    stops = torch.as_tensor([stop] if isinstance(stop, int) else sorted(stop or ()), dtype=torch.long, device=device)
    done = torch.zeros(b, dtype=torch.bool, device=device)
    model.eval()
    try:
        new = prompts
        for i in range(t, t + max_new_tokens):
            context = {} if valid is None else {"valid": valid[:, :i]}
            hidden = model.hidden(new, state, **context)[:, -1]
            token = sample(model.logits(hidden), temperature, top_k, top_p, generator)
            if len(stops):
                token = torch.where(done, out[:, i - 1], token)
                done |= torch.isin(token, stops)
            out[:, i] = token
            new = token[:, None]
            if stream is not None:
                stream(token)
            if len(stops) and done.all():
                out[:, i + 1 :] = new
                break
    finally:
        model.train(was_training)
    return out if isinstance(tokens, Tensor) else _unpad(out, valid, t, stops)


def _prompts(tokens, device) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b total"] | None]:
    """A batch of prompts, padded on the left where their lengths differ, and where it is valid."""
    if isinstance(tokens, Tensor):
        require(
            tokens.ndim == 2, f"tokens has shape {tuple(tokens.shape)}, and must be (batch, time): use tokens[None]"
        )
        require(tokens.numel() > 0, f"tokens has shape {tuple(tokens.shape)}: a prompt needs at least one token")
        return tokens.to(device), None
    require(len(tokens) > 0, "there is no prompt in the list")
    lengths = [len(p) for p in tokens]
    require(min(lengths) > 0, f"prompt {lengths.index(min(lengths))} is empty: a prompt needs at least one token")
    longest = max(lengths)
    batch = torch.zeros(len(tokens), longest, dtype=torch.long, device=device)
    for row, prompt in zip(batch, tokens, strict=True):
        row[longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
    start = torch.tensor([longest - n for n in lengths], device=device)
    return batch, _Valid(start) if min(lengths) < longest else None


class _Valid:
    """Validity over any length, from how much padding each row starts with: `valid[:, :i]`."""

    def __init__(self, start: Int[Tensor, "b"]):
        self.start = start

    def __getitem__(self, index) -> Bool[Tensor, "b s"]:
        return torch.arange(index[1].stop, device=self.start.device) >= self.start[:, None]


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p, seed) -> None:
    require_counts(0, max_new_tokens=max_new_tokens)
    require_counts(top_k=top_k)
    require(temperature >= 0, f"temperature is {temperature}, and must be 0 (greedy) or more")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}, and must be above 0 and at most 1, or None")
    require(seed is None or -(2**63) <= seed < 2**64, f"seed is {seed}, and must fit in 64 bits")
    low, high, vocab = prompts.min().item(), prompts.max().item(), model.config.vocab_size
    require(
        low >= 0 and high < vocab,
        f"the prompt has token {high if high >= vocab else low}, and this model's vocabulary is 0 to {vocab - 1}: "
        "was it encoded by another tokenizer?",
    )
    length, table = prompts.shape[1], getattr(getattr(model, "position", None), "max_positions", math.inf)
    require(
        length + max_new_tokens - 1 <= table,
        f"a prompt of {length} tokens and {max_new_tokens} new ones don't fit in this model's {table} positions: "
        "shorten the prompt or ask for fewer",
    )


def _unpad(out, valid, t, stops) -> list[Tensor]:
    rows = list(out) if valid is None else [row[start:] for row, start in zip(out, valid.start.tolist(), strict=True)]
    cut = []
    for row in rows:
        generated = row[len(row) - (out.shape[1] - t) :]
        at = torch.isin(generated, stops).nonzero()
        cut.append(row if len(at) == 0 else row[: len(row) - len(generated) + at[0, 0] + 1])
    return cut
