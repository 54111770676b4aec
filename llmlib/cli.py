"""The command line: `python -m llmlib info | generate | compare | train`."""

import argparse
import json
import os
import sys
from pathlib import Path

from llmlib.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    TrainingError,
    UnsupportedArchitectureError,
    require,
)

BOOK_MODEL = Path(__file__).parent / "book_model"
_MOST = 10**9
DTYPES = ("float32", "bfloat16", "float16")
_EXAMPLES = """examples:
  python -m llmlib info llama-3-8b --context 8192
  python -m llmlib info ./checkpoint --json
  python -m llmlib generate gpt2 "The capital city of France is" --max-new-tokens 20
  python -m llmlib generate --preset "def read(path):" --temperature 0.8 --seed 1
  python -m llmlib compare llama-2-7b llama-3-8b
  python -m llmlib train config.yaml --steps 500 --out checkpoints/run.pt

COMMAND --help explains the options of a command.
"""
_MODEL = (
    "a preset (llama-3-8b), a checkpoint's folder, a name on the Hugging Face hub (owner/name, or "
    "owner/name@revision), or a YAML file"
)


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m llmlib", description="Look at, run and train language models built from llmlib.",
        epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what a model is made of and what it costs",
                               description="Print a model's layers, its parameters by part, and what a token costs. "
                                           "No weights are read, nor fetched.")  # fmt: skip
    info.add_argument("model", help=_MODEL)
    info.add_argument("--context", type=int, default=4096, metavar="N", help="length of the text (default 4096 tokens)")
    info.add_argument("--batch", type=int, default=1, metavar="N", help="texts at once (default 1)")
    info.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and cache (default bfloat16)")
    info.add_argument("--svg", metavar="FILE", help="also write the block diagram as SVG")
    info.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    info.set_defaults(run=run_info)

    generate = commands.add_parser("generate", help="continue a text",
                                   description="Continue each prompt by a model's next tokens. What is fetched from "
                                               "the hub is kept, and read without a network afterwards.")  # fmt: skip
    generate.add_argument("words", nargs="*", metavar="MODEL PROMPT",
                          help="a checkpoint's folder or its name on the Hugging Face hub (owner/name, or "
                               "owner/name@revision), then one prompt or several, each in quotes")  # fmt: skip
    generate.add_argument("--preset", action="store_true",
                          help="name no MODEL: the small one that the book trains continues the prompts")  # fmt: skip
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N",
                          help="stop after N tokens, where the model doesn't before (default 64)")  # fmt: skip
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T",
                          help="0 takes the most likely token each time (default); 1 draws by the model's "
                               "probabilities; between them the likely ones gain")  # fmt: skip
    generate.add_argument("--top-k", type=int, metavar="K",
                          help="draw among the K most likely tokens only; needs a temperature above 0")  # fmt: skip
    generate.add_argument("--top-p", type=float, metavar="P",
                          help="draw among the fewest tokens that make up probability P (0 < P ≤ 1); needs a "
                               "temperature above 0")  # fmt: skip
    generate.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same text (default: anew)")
    generate.add_argument("--dtype", choices=DTYPES, default="float32", help="what to compute in (default float32)")
    generate.add_argument("--device", help="cpu, cuda, mps (default: cpu)")
    generate.add_argument("--json", action="store_true", help="print a JSON object for each prompt, one a line")
    generate.set_defaults(run=run_generate)

    compare = commands.add_parser("compare", help="what differs between two models",
                                  description="Print each setting that two models don't share. No weights are read, "
                                              "nor fetched.")  # fmt: skip
    compare.add_argument("one", help=_MODEL)
    compare.add_argument("other", help="what to compare it with, named likewise")
    compare.add_argument("--svg", metavar="FILE", help="also write the table as SVG")
    compare.add_argument("--json", action="store_true", help="print one JSON list instead of text")
    compare.set_defaults(run=run_compare)

    train = commands.add_parser("train", help="train a model from a YAML config, on bytes",
                                description="Train a model to predict the next byte of a text, and go on where an "
                                            "earlier run stopped.")  # fmt: skip
    train.add_argument("config", help="a YAML file: a ModelConfig with vocab_size 256, or the compact form")
    train.add_argument("--data", help="a text file or folder (default: Python's own standard library)")
    train.add_argument("--steps", type=int, default=500, help="optimiser steps in all (default 500)")
    train.add_argument("--batch-size", type=int, default=16, help="examples in each step (default 16)")
    train.add_argument("--time", type=int, default=128, help="tokens in each example (default 128)")
    train.add_argument("--learning-rate", type=float, default=3e-3, help="the highest (default 0.003)")
    train.add_argument("--seed", type=int, default=0, help="of the first weights and of the examples (default 0)")
    train.add_argument("--out", default="checkpoints/run.pt", help="checkpoint to write, and to resume from")
    train.set_defaults(run=run_train)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done. 2: an error that llmlib foresees, as one line on stderr. 1: whoever read the output has gone. 130: Ctrl-C.
    """
    options = parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except (ConfigError, CheckpointError, CorpusError, TrainingError, UnsupportedArchitectureError) as error:
        print(f"llmlib {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"llmlib {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def config_of(name: str):
    """The config behind a preset's name, a YAML file, a checkpoint's folder or a hub name."""
    from llmlib import presets

    if name in presets.PRESETS:
        return presets.get(name)
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    if os.path.isdir(name) or any(mark in name for mark in "/\\@"):
        from llmlib.hf import find, read_config

        return read_config(find(name, weights=False))[0]
    return presets.get(name)


def _from_yaml(path: Path):
    from llmlib.compact import from_yaml
    from llmlib.model import ModelConfig

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror})") from None
    return ModelConfig.from_yaml(text) if "\nlayers:" in "\n" + text else from_yaml(text)


def run_info(options) -> None:
    """Print what a model is made of, and what it costs."""
    for name in ("context", "batch"):
        value = getattr(options, name)
        require(1 <= value <= _MOST, f"--{name} is {value}, and must be at least 1 and at most {_MOST:,}")
    config = config_of(options.model)
    facts = describe(config, options.context, options.batch, options.dtype)
    if options.svg:
        from llmlib.diagram import diagram

        write_svg(diagram(config), options.svg)
    print(json.dumps(facts, indent=2) if options.json else as_text(config, facts))


def write_svg(drawing, file: str) -> None:
    """Save a drawing, or say why not."""
    try:
        drawing.save(file)
    except OSError as error:
        raise ConfigError(
            f"--svg {file} can't be written ({error.strerror}): give a file in a folder that is there"
        ) from None


def describe(config, context: int, batch: int, dtype: str) -> dict:
    """The numbers that `info` prints, in whole units: parameters, FLOPs, bytes."""
    import torch

    from llmlib import cost

    kind = getattr(torch, dtype)
    held, active = cost.parameters(config), cost.parameters(config, active=True)
    needed = cost.memory(config, context, batch, kind)
    return {
        "name": config.name, "d_model": config.d_model, "vocab_size": config.vocab_size,
        "layers": len(config.layers), "parameters": held.as_dict(), "active_parameters": active.total,
        "flops_per_token": cost.flops(config, 1, context - 1).as_dict(),
        "cache_bytes_per_token": cost.cache_per_token(config, context, kind), "context": context, "batch": batch,
        "dtype": dtype, "memory_bytes": needed | {"total": sum(needed.values())},
    }  # fmt: skip


def as_text(config, facts: dict) -> str:
    """The facts for a person."""
    from llmlib.diagram import outline

    held = facts["parameters"]
    lines = [facts["name"] or "model", "", *outline(config), ""]
    lines += [f"{'parameters':<24}{held['total']:>20,}   {short(held['total'])}"]
    lines += [f"  {part:<22}{n:>20,}   {n / held['total']:.1%}" for part, n in held.items() if part != "total" and n]
    if facts["active_parameters"] != held["total"]:
        lines += [f"{'active for each token':<24}{facts['active_parameters']:>20,}   "
                  f"{short(facts['active_parameters'])}"]  # fmt: skip
    context, batch, dtype = facts["context"], facts["batch"], facts["dtype"]
    lines += ["", f"at a context of {context:,} tokens, batch {batch}, {dtype}:"]
    lines += [f"{'FLOPs for a token':<24}{facts['flops_per_token']['total']:>20,}"]
    lines += [f"{'cache for a token':<24}{facts['cache_bytes_per_token']:>20,.0f}   bytes"]
    lines += [f"{what:<24}{n:>20,}   {n / 2**30:.2f} GiB" for what, n in facts["memory_bytes"].items()]
    return "\n".join(lines)


def short(n: float) -> str:
    """1 500 000 000 as 1.50 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return f"{n:g}"


def run_generate(options) -> None:
    """Continue each prompt, printing the text as it comes."""
    prompts = options.words if options.preset else options.words[1:]
    if not options.preset and not options.words:
        raise CheckpointError(
            "name a checkpoint's folder or a hub model, then a prompt; with neither at hand, use the small model that "
            "the book trains: python -m llmlib generate --preset \"def main():\""
        )  # fmt: skip
    for prompt in prompts:
        require(is_text(prompt), f"the prompt {prompt!r} isn't valid Unicode: is it in your terminal's encoding?")
    if not prompts:
        raise ConfigError('there is no prompt: put it in quotes after the model, "The capital city of France is"')
    model, tokenizer, ends = open_model(BOOK_MODEL if options.preset else options.words[0], options)
    encoded = [tokenizer.encode(p) for p in prompts]
    warn_of_length(max(map(len, encoded)) + options.max_new_tokens, model)
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if not tokens:
            raise ConfigError(f"the prompt {prompt!r} has no tokens: write at least one character")
    settings = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p,
                "seed": options.seed, "stop": ends}  # fmt: skip
    printer = Printer(tokenizer, prompts[0], encoded[0], ends) if len(prompts) == 1 and not options.json else None
    rows = model.generate(encoded, options.max_new_tokens, stream=printer, **settings)
    if printer is not None:
        printer.finish()
        return
    for prompt, tokens, row in zip(prompts, encoded, rows, strict=True):
        new = [t for t in row.tolist()[len(tokens) :] if t not in ends]
        text = tokenizer.decode([*tokens, *new])
        print(json.dumps({"prompt": prompt, "text": text, "tokens": new}) if options.json else text)


def is_text(prompt: str) -> bool:
    """Whether a prompt can be written as UTF-8; an argument's bytes that are none come as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in prompt)


def warn_of_length(length: int, model) -> None:
    """Say on stderr that a text may outgrow what its model has seen; a table of positions has an error of its own."""
    meant = model.config.max_seq_len
    if meant is not None and length > meant and not hasattr(model.position, "max_positions"):
        print(
            f"llmlib generate: the text may grow to {length:,} tokens; beyond {meant:,}, which this model is meant "
            f"for, it may make little sense", file=sys.stderr,
        )  # fmt: skip


def open_model(source, options):
    """(model, tokenizer, the tokens that end a text) of a checkpoint."""
    import torch

    from llmlib.hf import find, load
    from llmlib.tokenizer import load_tokenizer

    check_device(options.device)
    try:
        folder = find(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{preset_advice(source)}{error}. Or run the small model that the book trains: python -m llmlib generate "
            f"--preset PROMPT"
        ) from None
    model = load(folder, device=options.device, dtype=getattr(torch, options.dtype))
    return model, load_tokenizer(folder), ends_of(folder)


def preset_advice(source) -> str:
    """What to say of a name that is a preset's: sizes are known, weights are not."""
    from llmlib import presets

    if source not in presets.PRESETS:
        return ""
    return (f"{source!r} is a preset, which has sizes and no weights: give a folder or hub name that has them, such as "
            f"openai-community/gpt2. ")  # fmt: skip


def check_device(name: str | None) -> None:
    """ConfigError unless a tensor can be made there."""
    import torch

    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} can't be used here ({reason}): cpu always can") from None


def ends_of(folder: Path) -> set[int]:
    """The tokens that end a text, from generation_config.json if it says so, or else from config.json.

    CheckpointError where one of these files can't be read or names what is no token.
    """
    from llmlib.hf.checkpoint import read_json

    for file in (folder / "generation_config.json", folder / "config.json"):
        ends = read_json(file).get("eos_token_id") if file.exists() else None
        if ends is not None:
            ends = ends if isinstance(ends, list) else [ends]
            require(
                all(type(end) is int for end in ends),
                f"{file}: eos_token_id is {ends}, and must be whole numbers", CheckpointError,
            )  # fmt: skip
            return set(ends)
    return set()


class Printer:
    """Prints one text as its tokens come, holding back bytes that don't make a character yet."""

    def __init__(self, tokenizer, prompt: str, tokens: list[int], ends: set[int]):
        self.tokenizer, self.tokens, self.ends = tokenizer, list(tokens), ends
        self.shown, self.prompt = tokenizer.decode(tokens), prompt

    def __call__(self, column) -> None:
        self._begin()
        token = column[0].item()
        if token in self.ends:
            return
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[len(self.shown) :])
            sys.stdout.flush()
            self.shown = text

    def _begin(self) -> None:
        """Write the prompt, once the first token has come and nothing can be wrong with the request."""
        sys.stdout.write(self.prompt)
        self.prompt = ""

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        self._begin()
        print(self.tokenizer.decode(self.tokens)[len(self.shown) :])


def run_compare(options) -> None:
    """Print what differs between two configs."""
    from llmlib.diagram import difference, difference_table

    one, other = config_of(options.one), config_of(options.other)
    if options.svg:
        write_svg(difference_table(one, other), options.svg)
    rows = difference(one, other)
    if options.json:
        print(json.dumps([dict(zip(("what", options.one, options.other), row, strict=True)) for row in rows], indent=2))
        return
    if not rows:
        print(f"{options.one} and {options.other} are the same")
        return
    rows = [("", options.one, options.other), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")


def run_train(options) -> None:
    """Train on bytes, resuming from the checkpoint if it is there."""
    import torch

    from llmlib import data
    from llmlib.model import CausalLM
    from llmlib.train import evaluate, train

    config = _from_yaml(Path(options.config))
    if config.vocab_size != data.VOCAB_SIZE:
        raise ConfigError(f"vocab_size is {config.vocab_size}; training reads bytes, so it must be {data.VOCAB_SIZE}")
    torch.manual_seed(options.seed)
    corpus = data.load_corpus(options.data)
    model = CausalLM(config)
    print(f"{short(model.num_parameters())} parameters, {options.steps} steps, checkpoint {options.out}")
    history = train(
        model, corpus, steps=options.steps, batch_size=options.batch_size, time=options.time,
        learning_rate=options.learning_rate, seed=options.seed, checkpoint=options.out, progress=sys.stderr.isatty(),
    )  # fmt: skip
    loss = evaluate(model, corpus.validation, time=options.time)
    print(f"training loss {history.losses[-1]:.3f}, validation loss {loss:.3f} nats per byte")
