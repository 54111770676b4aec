"""Checkers of chapter 00, and answers that they must refuse."""

import math

import torch

from llmlib import cost, presets
from llmlib.attention import Attention
from llmlib.ffn import MLP, SwiGLU
from llmlib.model import Block, CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.notebook.exercises import wrong


def bits(convert) -> None:
    """Nats per token to bits per byte."""
    if math.isclose(convert(math.log(2), 1.0), math.log(2)):
        wrong("a loss of ln 2 nats is one bit, and yours is still in nats")
    if math.isclose(convert(math.log(2), 4.0), 4.0):
        wrong("a token of 4 bytes that costs 1 bit costs less than 1 bit for each byte")
    for loss, size in ((math.log(2), 1.0), (2.0, 4.0), (3.1, 4.6)):
        if not math.isclose(convert(loss, size), loss / math.log(2) / size):
            wrong(f"for {loss:.3g} nats per token of {size} bytes you say {convert(loss, size):.4g} bits per byte")


def parameters(count) -> None:
    """Parameters of a Llama, by a formula."""
    for name in ("llama-7b", "llama-3-8b", "llama-3.1-405b"):
        config = presets.get(name)
        attention, ffn = config.layers[0].mixer.options, config.layers[0].ffn.options
        sizes = (config.d_model, len(config.layers), attention["num_heads"], attention["num_kv_heads"], ffn["d_ff"])
        mine, right = count(*sizes, config.vocab_size), cost.parameters(config)
        if mine == right.total:
            continue
        norms = right.total - right.norm
        known = {
            norms: "the gains of the norms are missing",
            right.total - right.head: "embedding and head are two tables",
        }
        wrong(
            f"{name} has {right.total:,} parameters, and you count {mine:,}"
            + "; " * (mine in known)
            + known.get(mine, "")
        )


def cache(count) -> None:
    """Bytes of keys and values."""
    for heads, groups, layers, time, dtype in ((8, 2, 3, 100, torch.bfloat16), (4, 4, 5, 33, torch.float32)):
        layer = Layer(mixer=spec(Attention, num_heads=heads, num_kv_heads=groups), ffn=spec(SwiGLU, d_ff=32))
        config = ModelConfig(vocab_size=16, d_model=64, layers=layers * (layer,), norm=spec(RMSNorm))
        mine, right = count(layers, groups, 64 // heads, time, dtype.itemsize), cost.cache(config, time, dtype=dtype)
        if mine == right / 2:
            wrong("you count half of what the model keeps: what does it need besides the keys?")
        if mine != right:
            wrong(f"{layers} layers with {groups} heads of width {64 // heads} for keys keep {right:,} bytes of {time} "
                  f"tokens at {dtype.itemsize} bytes a number, not {mine:,}")  # fmt: skip


def parallel(block) -> None:
    """The parallel block."""
    layer = Layer(mixer=spec(Attention, num_heads=2), ffn=spec(MLP, d_ff=32), parallel=True)
    library = Block(layer, 16, spec(RMSNorm))
    with torch.no_grad():
        for weight in library.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.4)
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
        mine = block(x, library.mixer, library.ffn, library.mixer_norm)
        if torch.allclose(mine, library(x) - x, atol=1e-5):
            wrong("x itself is lost: the block must add to the stream")
        after = x + library.mixer(library.mixer_norm(x))
        if torch.allclose(mine, after + library.ffn(library.mixer_norm(after)), atol=1e-5):
            wrong("your feed-forward reads what the mixer wrote: this is the sequential block")
        if mine.shape != x.shape or not torch.allclose(mine, library(x), atol=1e-5):
            wrong("the result differs from llmlib's Block(Layer(…, parallel=True))")


def nucleus(cut) -> None:
    """Top-p sampling's probabilities."""
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])
    p = logits.softmax(0)
    for top_p, keep in ((0.3, [1]), (0.5, [1, 4]), (0.9, [1, 2, 4]), (1.0, [0, 1, 2, 3, 4])):
        got = cut(logits, top_p)
        if got.shape != p.shape:
            wrong(f"{len(p)} logits should give {len(p)} probabilities, zero where cut, not {tuple(got.shape)}")
        kept = got.nonzero().flatten().tolist()
        if kept != keep:
            wrong(f"for p = {top_p} and probabilities {[round(v, 2) for v in p.tolist()]} you keep tokens {kept}: "
                  f"is it the smallest set of the likeliest tokens that reaches p?")  # fmt: skip
        if not math.isclose(got.sum().item(), 1.0, rel_tol=1e-5):
            wrong(f"what is kept sums to {got.sum().item():.3f}, not to 1")
        if not torch.allclose(got[keep], p[keep] / p[keep].sum(), atol=1e-5):
            wrong("the tokens that stay should keep their ratios")


def causal(test) -> None:
    """A test of causality for any function from tokens to logits."""

    def sees(ahead: int, dim: int = 16):
        """Logits at t that depend on the tokens up to t + ahead."""
        generator = torch.Generator().manual_seed(dim)
        table = torch.randn(dim, dim, generator=generator)

        def model(tokens):
            x = table[tokens % dim]
            seen = x.cumsum(1)
            shifted = torch.cat([seen[:, ahead:], seen[:, -1:].expand(-1, ahead, -1)], 1) if ahead else seen
            return shifted.sin() @ table.T

        return model

    def only_the_last(tokens):
        logits = sees(0)(tokens)
        logits[:, 0] += tokens[:, -1:].float()
        return logits

    torch.manual_seed(0)
    layer = Layer(mixer=spec(Attention, num_heads=2, rope_theta=1e4), ffn=spec(SwiGLU, d_ff=16))
    config = ModelConfig(vocab_size=16, d_model=16, layers=(layer,), norm=spec(RMSNorm))
    both_ways = config.replace(layers=(Layer(mixer=layer.mixer.replace(causal=False), ffn=layer.ffn),))
    cases = (
        (CausalLM(config), True, "a causal transformer"), (sees(0), True, "a model that sums over the past"),
        (CausalLM(both_ways), False, "a bidirectional transformer"), (sees(1), False, "one that sees one token ahead"),
        (only_the_last, False, "one whose first position alone sees the last token"),
    )  # fmt: skip
    for model, right, name in cases:
        with torch.no_grad():
            mine = bool(test(model, 16))
        if mine != right:
            wrong(f"{name} is {'' if right else 'not '}causal, and you say that it is{' not' if right else ''}")


def interleave(make) -> None:
    """A config whose attention is mostly local."""
    config = presets.get("llama-3.2-1b")
    for every in (4, 2):
        made = make(config, every)
        if not isinstance(made, ModelConfig):
            wrong(f"this should give a ModelConfig, not a {type(made).__name__}")
        if len(made.layers) != len(config.layers):
            wrong(f"the model had {len(config.layers)} layers, and yours has {len(made.layers)}")
        windows = [layer.mixer.options.get("window") for layer in made.layers]
        full = [i for i, window in enumerate(windows) if window is None]
        right = list(range(every - 1, len(windows), every))
        if full != right:
            wrong(f"with every={every} the layers with full attention should be {right}, and yours are {full}")
        if {w for w in windows if w is not None} != {512}:
            wrong(
                f"the local layers should have window=512, and yours have { ({w for w in windows if w is not None}) }"
            )
        for before, after in zip(config.layers, made.layers, strict=True):
            if after.ffn != before.ffn or after.mixer.replace(window=None) != before.mixer.replace(window=None):
                wrong("something besides the window has changed")


def _lost_x(x, mixer, ffn, norm):
    return mixer(norm(x)) + ffn(norm(x))


def _sequential(x, mixer, ffn, norm):
    x = x + mixer(norm(x))
    return x + ffn(norm(x))


def _top_k_only(logits, p):
    return logits.softmax(0) * (logits.softmax(0) >= 1 - p)


def _unnormalised(logits, p):
    q, order = logits.softmax(0).sort(descending=True)
    return torch.zeros_like(q).scatter(0, order, q * (q.cumsum(0) - q < p))


def _looks_one_ahead(model, vocab_size):
    tokens = torch.randint(vocab_size, (1, 8))
    other = tokens.clone()
    other[0, 1] = (other[0, 1] + 1) % vocab_size
    return torch.allclose(model(tokens)[:, 0], model(other)[:, 0])


WRONG = {
    "bits": [lambda loss, _: loss, lambda loss, size: loss / math.log(2) * size, lambda loss, size: loss / size],
    "parameters": [
        lambda d, n, h, g, f, v: n * (2 * d * d * (1 + g / h) + 3 * d * f) + 2 * v * d,
        lambda d, n, h, g, f, v: n * (4 * d * d + 3 * d * f + 2 * d) + 2 * v * d + d,
    ],
    "cache": [lambda n, g, d, t, b: n * g * d * t * b, lambda n, g, d, t, b: 2 * n * g * d * t],
    "parallel": [_lost_x, _sequential],
    "nucleus": [_top_k_only, _unnormalised, lambda logits, _: logits.softmax(0)],
    "causal": [lambda *_: True, lambda *_: False, _looks_one_ahead],
    "interleave": [
        lambda config, _: config,
        lambda config, every: config.replace(layers=tuple(
            Layer(mixer=x.mixer if i % every == 0 else x.mixer.replace(window=512), ffn=x.ffn)
            for i, x in enumerate(config.layers))),
    ],
}  # fmt: skip
