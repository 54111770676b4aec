"""Whole models against transformers on the same checkpoint: generation, prefill, a training step.

    python benchmarks/checkpoints.py [family ...]

Models of 10 to 20 million parameters, float32, T = 512, two threads; the median of interleaved pairs, in which each
goes first in turn. A ratio below 1 means that llmlib takes less time.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from attention import ratio

from llmlib import load

warnings.filterwarnings("ignore")
ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
FAMILIES = {
    "gpt2": {"vocab_size": 8192, "n_embd": 384, "n_layer": 6, "n_head": 6},
    "llama": {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, **ATTENTION},
    "mixtral": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_local_experts": 8, "num_experts_per_tok": 2, **ATTENTION,
    },
    "granitemoehybrid": {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 256, "shared_intermediate_size": 512,
        "num_hidden_layers": 5, "num_local_experts": 8, "num_experts_per_tok": 2, "mamba_n_heads": 16,
        "mamba_d_head": 32, "mamba_d_state": 64, "mamba_chunk_size": 64, **ATTENTION,
        "layer_types": ["mamba", "mamba", "attention", "mamba", "mamba"],
    },
    "mamba": {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 8, "state_size": 16},
    "mamba2": {
        "vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 8, "state_size": 64, "num_heads": 12,
        "head_dim": 64, "n_groups": 1, "chunk_size": 64,
    },
}  # fmt: skip


def pair(family: str, folder: Path):
    """transformers' model and llmlib's, from one file."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family])).eval()
    theirs.save_pretrained(folder / family)
    return theirs, load(folder / family)


def tasks(theirs, mine, batch: int) -> dict:
    """name → (what transformers does, what llmlib does)."""
    vocab = mine.config.vocab_size
    prompt, text = torch.randint(3, vocab, (batch, 32)), torch.randint(3, vocab, (batch, 512))
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}

    def their_prefill():
        with torch.no_grad():
            theirs(text, use_cache=True, logits_to_keep=1)

    def my_prefill():
        with torch.no_grad():
            mine.logits(mine.hidden(text, mine.new_state(512))[:, -1:])

    def step(model, loss):
        model.requires_grad_(True)
        loss().backward()
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)

    def their_loss():
        logits = theirs(text, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    return {
        "generate 64": (lambda: theirs.generate(prompt, **options), lambda: mine.generate(prompt, 64)),
        "prefill 512": (their_prefill, my_prefill),
        "training step": (lambda: step(theirs, their_loss), lambda: step(mine, lambda: mine.loss(text))),
    }


def main() -> None:
    """Print a table, and the same as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=[], help=f"some of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in options.families or FAMILIES:
            theirs, mine = pair(family, Path(folder))
            for batch in options.batches:
                for name, (a, b) in tasks(theirs, mine, batch).items():
                    value, my_seconds, their_seconds = ratio(b, a, options.pairs)
                    rows.append({"family": family, "parameters": mine.num_parameters(), "batch": batch, "task": name,
                                 "ratio": value, "llmlib_s": my_seconds, "transformers_s": their_seconds})  # fmt: skip
                    if not options.json:
                        print(f"{family:<18}{mine.num_parameters() / 1e6:5.1f} M  batch {batch}  {name:<14}"
                              f"{value:6.2f} ×   {my_seconds:7.3f} s  {their_seconds:7.3f} s", flush=True)  # fmt: skip
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
