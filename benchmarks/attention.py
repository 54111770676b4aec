"""How fast attention, positions, norms and feed-forwards are on a CPU: python benchmarks/attention.py

Interleaved pairs, the median of their ratios, two threads; each line says its target. Ratios, so that they hold on
other machines; the peer runs in the same process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from llmlib.attention import MLA, Attention, attention, cache_bytes
from llmlib.context import Context
from llmlib.ffn import GeGLU, SwiGLU
from llmlib.norm import LayerNorm, RMSNorm
from llmlib.position import RoPE, rope


def ratio(ours, theirs, pairs: int, repeats: int = 1) -> tuple[float, float, float]:
    """(median over interleaved pairs of ours / theirs, median seconds of ours, of theirs)."""

    def seconds(run):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    for run in (ours, theirs):
        run(), run()
    times = []
    for i in range(pairs):  # each goes first every other time
        first, second = (ours, theirs) if i % 2 else (theirs, ours)
        a, b = seconds(first), seconds(second)
        times.append((a, b) if i % 2 else (b, a))
    mine, other = zip(*times, strict=True)
    return statistics.median(a / b for a, b in times), statistics.median(mine), statistics.median(other)


@torch.no_grad()
def through_the_switch(pairs):
    q, k, v = (torch.randn(1, 8, 4096, 64) for _ in range(3))
    ours, theirs = lambda: attention(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    yield "attention through the switch (1, 8, 4096, 64) / bare SDPA", 1.05, ratio(ours, theirs, pairs)
    q, k, v = (torch.randn(1, 8, 16, 64) for _ in range(3))
    ours, theirs = lambda: attention(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    yield "  the same at t = 16, where the call itself weighs most", None, ratio(ours, theirs, pairs, 200)


@torch.no_grad()
def mla_decoding(pairs, context: int = 4096):
    sizes = {"num_heads": 16, "kv_latent_dim": 512, "head_dim": 128, "d_rope": 64}
    absorbed, expanded = MLA(2048, **sizes, absorb=True), MLA(2048, **sizes, absorb=False)
    expanded.load_state_dict(absorbed.state_dict())
    x, states = torch.randn(1, 1, 2048), []
    for layer in (absorbed, expanded):
        state = {"reserve": context + 4 * pairs + 8}
        MLA.forward(layer, torch.randn(1, context, 2048), state)
        states.append(state)

    def step(layer, state):
        def run():
            state["length"] = context
            layer(x, state)

        return run

    runs = step(absorbed, states[0]), step(expanded, states[1])
    yield f"MLA, one token after {context}: absorbed / re-expanding", 0.5, ratio(*runs, pairs)


@torch.no_grad()
def windows(pairs):
    q, k, v = (torch.randn(1, 8, 8192, 64) for _ in range(3))
    ours, theirs = lambda: attention(q, k, v, window=256), lambda: attention(q, k, v)
    yield "window of 256 at t = 8192 / full attention", 0.25, ratio(ours, theirs, pairs)
    layer, sizes = Attention(64, num_heads=2, window=256), []
    for t in (1024, 8192):
        layer(torch.randn(1, t, 64), state := {})
        sizes.append(cache_bytes(state))
    yield "its cache at t = 8192 / at t = 1024", 1.0, (sizes[1] / sizes[0], sizes[1], sizes[0])


def trained(layer, x, *more):
    """One forward and backward."""
    x = x.clone().requires_grad_()

    def run():
        y = layer(x, *more)
        sum(z.sum() for z in (y if isinstance(y, tuple) else (y,))).backward()

    return run


def modules(pairs):
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, hidden_act="silu")
    gelu = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, hidden_act="gelu")
    q, k, x = torch.randn(2, 16, 1024, 64), torch.randn(2, 16, 1024, 64), torch.randn(2, 512, 1024)
    rotary, ours = llama.LlamaRotaryEmbedding(config), RoPE(64, 10000.0)
    at = torch.arange(1024)[None]

    def our_rope(q):
        angles = ours(0, q, Context())
        return rope(q, *angles), rope(k, *angles)

    def their_rope(q):
        return llama.apply_rotary_pos_emb(q, k, *rotary(q, at))

    layers = [
        ("RoPE", SimpleNamespace(ours=our_rope, theirs=their_rope), q),
        ("RMSNorm", SimpleNamespace(ours=RMSNorm(1024), theirs=llama.LlamaRMSNorm(1024)), x),
        ("LayerNorm", SimpleNamespace(ours=LayerNorm(1024), theirs=torch.nn.LayerNorm(1024)), x),
        ("SwiGLU", SimpleNamespace(ours=SwiGLU(1024, d_ff=2816), theirs=llama.LlamaMLP(config)), x),
        ("GeGLU", SimpleNamespace(ours=GeGLU(1024, d_ff=2816), theirs=llama.LlamaMLP(gelu)), x),
    ]
    for name, pair, inputs in layers:
        repeats = 40 if "Norm" in name else 1  # a norm takes a fifth of a millisecond

        def forward(layer, inputs=inputs):
            def run():
                with torch.no_grad():
                    layer(inputs)

            return run

        yield f"{name} / transformers, forward", 1.05, ratio(forward(pair.ours), forward(pair.theirs), pairs, repeats)
        both = trained(pair.ours, inputs), trained(pair.theirs, inputs)
        yield f"{name} / transformers, forward and backward", 1.05, ratio(*both, pairs, repeats)


def peak_bytes(t: int) -> int:
    """How far one forward and backward of attention through the switch lifts this process's largest memory."""
    q, k, v = (torch.randn(1, 8, t, 64, requires_grad=True) for _ in range(3))
    attention(q[:, :, :64], k[:, :, :64], v[:, :, :64]).sum().backward()
    before = largest_memory()
    attention(q, k, v).sum().backward()
    return largest_memory() - before


def largest_memory() -> int:
    """Bytes; Linux counts them from the start of the process (getrusage would count those of its parent too)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory():
    """In processes of their own, for a process never forgets its largest memory."""
    command = [sys.executable, __file__, "--peak"]
    short, long = (
        int(subprocess.run([*command, str(t)], capture_output=True, check=True).stdout) for t in (4096, 8192)
    )
    matrix = 8 * 4096**2 * 4
    yield "memory of forward and backward at t = 4096 / one matrix of scores", 0.5, (short / matrix, short, matrix)
    yield "the same at t = 8192 / at 4096 (linear: 2, quadratic: 4)", 2.5, (long / short, long, short)


PARTS = {
    "switch": through_the_switch,
    "mla": mla_decoding,
    "windows": windows,
    "modules": modules,
    "memory": lambda _: memory(),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="which to run; all unless given")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", help="write the lines there too")
    parser.add_argument("--peak", type=int, help="print the memory at this length and stop")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    if args.peak:
        print(peak_bytes(args.peak))
        return
    print(f"torch {torch.__version__}, two threads, medians of {args.pairs} interleaved pairs")
    rows = []

    def report(lines):
        for name, target, (value, mine, other) in lines:
            rows.append({"name": name, "ratio": value, "ours": mine, "theirs": other, "target": target})
            verdict = "" if target is None else f"target ≤ {target}  {'ok' if value <= target else 'MISSED'}"
            print(f"{name:68} {value:6.3f}   {mine:10.4g} / {other:10.4g}   {verdict}", flush=True)

    for name in args.parts or PARTS:
        report(PARTS[name](args.pairs))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "pairs": args.pairs, "lines": rows}, file, indent=1)


if __name__ == "__main__":
    main()
