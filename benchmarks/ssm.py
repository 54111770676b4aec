"""How fast and how small state space models are on a CPU: python benchmarks/ssm.py

Interleaved pairs, the median of their ratios, two threads; each line says its target. Ratios, so that they hold on
other machines; the peer runs in the same process. The peers are mambapy's parallel scan and transformers' own layers.
"""

import argparse
import json
import logging
import math
import subprocess
import sys
import time

import torch
from attention import largest_memory, ratio

from llmlib.attention import Attention
from llmlib.cost import state_bytes
from llmlib.ffn import SwiGLU
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.ssm import Mamba, Mamba2, selective_scan, ssd

logging.disable(logging.WARNING)  # transformers says that its kernels are missing; that is the point
SHAPES = [(2, 512, 512, 16), (1, 2048, 512, 16)]


def scan_inputs(b, t, d, n):
    x, B, C = (torch.randn(*s, requires_grad=True) for s in ((b, t, d), (b, t, n), (b, t, n)))
    dt = (torch.rand(b, t, d) * 0.1).requires_grad_()
    A = (-torch.arange(1.0, n + 1).expand(d, n)).clone().requires_grad_()
    return x, dt, A, B, C, torch.ones(d, requires_grad=True)


def by_pscan(x, dt, A, B, C, D):
    """What mambapy's layer computes, in its order."""
    from mambapy.pscan import pscan

    states = pscan(torch.exp(dt.unsqueeze(-1) * A), dt.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1))
    return (states @ C.unsqueeze(-1)).squeeze(3) + D * x


def trained(scan, args, **options):
    return lambda: torch.autograd.grad(scan(*args, **options).sum(), args)


def untrained(scan, args, **options):
    def run():
        with torch.no_grad():
            scan(*args, **options)

    return run


def scan_time(pairs):
    for shape in SHAPES:
        args = scan_inputs(*shape)
        both = trained(selective_scan, args), trained(by_pscan, args)
        yield f"selective_scan {shape}, forward and backward / pscan", 0.7, ratio(*both, pairs)
        both = trained(selective_scan, args), trained(selective_scan.reference, args)
        yield "  the same / its readable reference", None, ratio(*both, pairs)


def peak_of(scan: str, index: int) -> int:
    """How far one forward and backward lifts this process's largest memory."""
    run = {"ours": selective_scan, "pscan": by_pscan, "ssd": ssd}[scan]
    small, args = scan_inputs(1, 8, 8, 2), scan_inputs(*SHAPES[index]) if scan != "ssd" else ssd_inputs(index)
    trained(run if scan != "ssd" else selective_scan, small)()
    before = largest_memory()
    trained(run, args)()
    return largest_memory() - before


def in_its_own_process(scan: str, index: int) -> int:
    command = [sys.executable, __file__, "--peak", scan, str(index)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def memory(_):
    for i, shape in enumerate(SHAPES):
        ours, theirs = in_its_own_process("ours", i), in_its_own_process("pscan", i)
        yield f"selective_scan {shape}, its largest memory / pscan's", 0.5, (ours / theirs, ours, theirs)
    short, long = in_its_own_process("ssd", 2048), in_its_own_process("ssd", 16384)
    slope = math.log(long / short) / math.log(8)
    yield "ssd, slope of memory in t from 2k to 16k", 1.1, (slope, long, short)


def ssd_inputs(t, b=1, h=8, p=64, n=64):
    x, B, C = (torch.randn(*s, requires_grad=True) for s in ((b, t, h, p), (b, t, 1, n), (b, t, 1, n)))
    dt = (torch.rand(b, t, h) * 0.1).requires_grad_()
    return x, dt, (-torch.arange(1.0, h + 1)).requires_grad_(), B, C, torch.ones(h, requires_grad=True)


def ssd_time(pairs):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def theirs(x, dt, A, B, C, D, chunk_size):
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D=D)

    args = ssd_inputs(2048, b=2)
    for chunk, target in ((256, 0.5), (64, 0.5)):
        for name, run in (("forward and backward", trained), ("forward", untrained)):
            both = run(ssd, args), run(theirs, args, chunk_size=chunk)
            line = f"ssd (2, 2048, 8, 64), {name} / transformers, chunks of {chunk}"
            yield line, target, ratio(*both, pairs)


def ssd_slope(pairs):
    lengths = [1024 * 2**i for i in range(5)]
    runs = [trained(ssd, ssd_inputs(t)) for t in lengths]
    for run in runs:
        run()
    seconds = [min(timed(run) for _ in range(pairs)) for run in runs]
    xs, ys = [math.log(t) for t in lengths], [math.log(s) for s in seconds]
    mx, my = sum(xs) / 5, sum(ys) / 5
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)
    yield "ssd, log-log slope of time in t from 1k to 16k", 1.1, (slope, seconds[-1], seconds[0])


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def small_model(mixer, ffn=None):
    config = ModelConfig(vocab_size=256, d_model=256, layers=4 * (Layer(mixer, ffn),), norm=spec(RMSNorm))
    return CausalLM(config).eval()


@torch.no_grad()
def decoding(pairs):
    mixers = {
        "Mamba": spec(Mamba),
        "Mamba-2": spec(Mamba2, d_state=64),
        "attention": spec(Attention, num_heads=4, rope_theta=1e4),
    }
    for name, mixer in mixers.items():
        model, runs, sizes = small_model(mixer), [], []
        for length in (1024, 65536):
            tokens, state = torch.randint(256, (1, length)), model.new_state(reserve=length + 64 * (pairs + 4))
            for piece in tokens.split(2048, 1):
                model.hidden(piece, state)
            sizes.append(state_bytes(state))

            def step(model=model, state=state):
                model(torch.zeros(1, 1, dtype=torch.long), state)

            runs.append(step)
        target = None if name == "attention" else 1.1
        yield f"{name}: a token after 65536 tokens / after 1024", target, ratio(runs[1], runs[0], pairs, 20)
        yield f"{name}: bytes kept then / then", target, (sizes[1] / sizes[0], sizes[1], sizes[0])


def pair_of_models(kind: str):
    """The same small model, with the same weights, in transformers and here."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    width, layers, vocab = 512, 6, 8192
    if kind == "Mamba":
        config = MambaConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, tie_word_embeddings=True)
        theirs, mixer = MambaForCausalLM(config), spec(Mamba)
    else:
        config = Mamba2Config(
            vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_heads=16, head_dim=64, n_groups=1,
            tie_word_embeddings=True,
        )  # fmt: skip
        theirs, mixer = Mamba2ForCausalLM(config), spec(Mamba2)
    ours = CausalLM(
        ModelConfig(
            vocab_size=vocab, d_model=width, layers=layers * (Layer(mixer),), norm=spec(RMSNorm, eps=1e-5),
            tie_embeddings=True,
        )
    )  # fmt: skip
    names = {"backbone.embeddings": "embedding", "backbone.norm_f": "final_norm", ".norm.weight": ".mixer_norm.weight"}
    weights = {}
    for name, weight in theirs.state_dict().items():
        if name.startswith("lm_head"):
            continue
        if ".mixer." not in name:
            for old, new in names.items():
                name = name.replace(old, new)
        weights[name.replace("backbone.", "")] = weight
    ours.load_state_dict(weights, strict=False)
    tokens = torch.randint(vocab, (1, 32))
    with torch.no_grad():
        error = (ours.eval()(tokens) - theirs.eval()(tokens).logits).abs().max().item()
    assert error < 1e-3, f"the two {kind} models differ by {error}"
    return ours, theirs


def models(pairs):
    for kind in ("Mamba", "Mamba-2"):
        ours, theirs = pair_of_models(kind)
        prompt = torch.randint(8192, (1, 512))
        both = untrained(ours, [prompt]), untrained(theirs, [prompt])
        yield f"{kind} model, prefill of 512 / transformers", 1.0, ratio(*both, pairs)
        short = prompt[:, :16]
        both = (
            lambda ours=ours, short=short: ours.generate(short, 32),
            lambda theirs=theirs, short=short: theirs.generate(
                short, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None
            ),
        )
        yield f"{kind} model, 32 tokens generated / transformers", 1.0, ratio(*both, pairs)
        batch = torch.randint(8192, (2, 128))
        both = train_step(ours, batch), train_step(theirs, batch)
        yield f"{kind} model, training step (2, 128) / transformers", 1.0, ratio(*both, pairs)


def train_step(model, tokens):
    model.train()

    def run():
        logits = model(tokens)
        logits = getattr(logits, "logits", logits)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        model.zero_grad()

    return run


def hybrid_overhead(pairs):
    """What a layer costs beyond its op: one whole Mamba layer beside the scan and the two large products in it."""
    layer, x = Mamba(512), torch.randn(1, 512, 512)
    args = scan_inputs(1, 512, 1024, 16)

    def parts():
        layer.in_proj(x), selective_scan(*args), layer.out_proj(args[0])

    yield (
        "a Mamba layer / its scan and projections alone",
        None,
        ratio(untrained(layer, [x]), untrained(parts, []), pairs),
    )
    block = small_model(spec(Mamba2, d_state=64), spec(SwiGLU, d_ff=512))
    tokens = torch.randint(256, (1, 1024))
    both = (
        untrained(block, [tokens]),
        untrained(small_model(spec(Attention, num_heads=4), spec(SwiGLU, d_ff=512)), [tokens]),
    )
    yield "a Mamba-2 model at 1024 tokens / an attention model of its width", None, ratio(*both, pairs)


PARTS = {
    "scan": scan_time,
    "memory": memory,
    "ssd": ssd_time,
    "slope": ssd_slope,
    "decoding": decoding,
    "models": models,
    "layers": hybrid_overhead,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="which to run; all unless given")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", help="write the lines there too")
    parser.add_argument("--peak", nargs=2, help="print the memory of one scan and stop")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    if args.peak:
        print(peak_of(args.peak[0], int(args.peak[1])))
        return
    print(f"torch {torch.__version__}, two threads, medians of {args.pairs} interleaved pairs")
    rows = []
    for part in args.parts or PARTS:
        for name, target, (value, mine, other) in PARTS[part](args.pairs):
            rows.append({"name": name, "ratio": value, "ours": mine, "theirs": other, "target": target})
            verdict = "" if target is None else f"target ≤ {target}  {'ok' if value <= target else 'MISSED'}"
            print(f"{name:72} {value:6.3f}   {mine:10.4g} / {other:10.4g}   {verdict}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "pairs": args.pairs, "lines": rows}, file, indent=1)


if __name__ == "__main__":
    main()
