"""How fast a mixture-of-experts layer is on a CPU: python benchmarks/moe.py

Forward and backward of one layer (d 512, d_ff 1024, 16 experts, k 2, 2048 tokens) beside transformers' layer in each of
its CPU modes and beside one dense matrix product of the same active FLOPs; 8 experts beside 64; one token at a time.
Two threads, interleaved runs, medians; each line says its target. On a machine that others use, too, compare the time
that the processor spent (python benchmarks/moe.py --threads 1 --clock cpu): it is blind to the waiting.
"""

import argparse
import statistics
import time

import torch

from llmlib.ffn import SwiGLU
from llmlib.model import spec
from llmlib.moe import MoE, TopKRouter

D, F, TOKENS, K = 512, 1024, 2048, 2


def ours(num_experts: int) -> MoE:
    router = spec(TopKRouter, scoring="softmax_of_top_k")
    return MoE(D, num_experts=num_experts, top_k=K, expert=spec(SwiGLU, d_ff=F), router=router)


def transformers_layer(num_experts: int, mode: str):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=num_experts, num_experts_per_tok=K)
    config._experts_implementation = mode
    layer = MixtralSparseMoeBlock(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    return layer


def forward(layer, x):
    def run():
        with torch.no_grad():
            layer(x)

    return run


def forward_backward(layer, x):
    upstream, x = torch.randn_like(x), x.clone().requires_grad_()

    def run():
        layer.zero_grad()
        x.grad = None
        layer(x).backward(upstream)

    return run


def dense_product(backward: bool):
    """One product with as many multiplications as the active experts, and the two products of its backward."""
    x, weight, gradient = torch.randn(TOKENS * K, D), torch.randn(3 * F, D), torch.randn(TOKENS * K, 3 * F)

    def run():
        x @ weight.T
        if backward:
            gradient @ weight
            gradient.T @ x

    return run


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleave(runs: dict, pairs: int, clock: str) -> dict[str, float]:
    """Median seconds of each, all run in turn; the first round warms up."""
    now = CLOCKS[clock]
    seconds = {name: [] for name in runs}
    for _ in range(pairs + 1):
        for name, run in runs.items():
            start = now()
            run()
            seconds[name].append(now() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def report(title: str, times: dict[str, float], ratios: list[tuple[str, str, str]]) -> None:
    print(title)
    for name, t in times.items():
        print(f"  {name:32s}{t * 1e3:9.2f} ms")
    for a, b, target in ratios:
        print(f"  {a} / {b} = {times[a] / times[b]:.2f}  ({target})")


def main(pairs: int, threads: int, clock: str) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {threads} threads, medians of {clock} time over {pairs} interleaved rounds")
    x, token = torch.randn(1, TOKENS, D), torch.randn(1, 1, D)
    layer, layers = ours(16), {mode: transformers_layer(16, mode) for mode in ("eager", "grouped_mm", "batched_mm")}

    runs = {"llmlib": forward_backward(layer, x), "transformers grouped_mm": forward_backward(layers["grouped_mm"], x)}
    runs["one dense product"] = dense_product(backward=True)
    targets = [
        ("llmlib", "transformers grouped_mm", "at most 0.8"),
        ("llmlib", "one dense product", "at most 1.4"),
    ]
    report("forward + backward, 16 experts, k 2", interleave(runs, pairs, clock), targets)
    eager = interleave({"transformers eager": forward_backward(layers["eager"], x)}, 2, clock)
    report("  its other mode", eager, [])

    for name, measure in (("forward", forward), ("forward + backward", forward_backward)):
        runs = {f"{e} experts": measure(ours(e), x) for e in (8, 64)}
        target = "at most 1.4" if measure is forward else "at most 2.2"
        report(f"{name}, k 2", interleave(runs, pairs, clock), [("64 experts", "8 experts", target)])

    runs = {"llmlib": forward(layer.eval(), token)}
    runs |= {f"transformers {mode}": forward(other.eval(), token) for mode, other in layers.items()}
    best = [("llmlib", name, "no target") for name in list(runs)[1:]]
    report("one token, 16 experts, k 2", interleave(runs, 20 * pairs, clock), best)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    main(**vars(parser.parse_args()))
