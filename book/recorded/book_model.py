"""The small model behind `python -m llmlib generate --preset`: `make record CHAPTER=book_model`.

A Llama of 0.5 million parameters over a byte-level BPE of 768 tokens, both trained on the standard library's source,
written to llmlib/book_model/ as a checkpoint in Hugging Face's format (float16).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmlib import data
from llmlib.hf import FAMILIES
from llmlib.hf.tables import place
from llmlib.model import CausalLM
from llmlib.notebook import recording
from llmlib.presets.llama import llama
from llmlib.tokenizer import BPETokenizer
from llmlib.train import train

FOLDER = Path(__file__).parents[2] / "llmlib" / "book_model"
SIZES = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256,
         "num_key_value_heads": 2, "vocab_size": 768, "max_position_embeddings": 512}  # fmt: skip
STEPS, BATCH, TIME = 2500, 16, 192


def build() -> CausalLM:
    """The model, untrained."""
    torch.manual_seed(0)
    d, n, h, f, g, v, length = SIZES.values()
    return CausalLM(llama(d, n, h, f, g, vocab_size=v, max_seq_len=length, tie_embeddings=True))


def windows(tokens: torch.Tensor):
    """A task for `train`: random windows of the text, the same for the same step."""

    def draw(step: int):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(0, len(tokens) - TIME - 1, (BATCH,), generator=generator)
        rows = torch.stack([tokens[s : s + TIME + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    return draw


@torch.no_grad()
def bits_per_byte(model: CausalLM, tokens: torch.Tensor, length: int) -> float:
    """Mean loss over consecutive windows, in bits for each of the `length` bytes that the tokens stand for."""
    rows = tokens[: len(tokens) // (TIME + 1) * (TIME + 1)].view(-1, TIME + 1)[:200]
    losses = [model.loss(r[:, :-1], r[:, 1:]).item() for r in rows.split(20)]
    per_token = sum(losses) / len(losses) / 0.6931471805599453
    return per_token * len(tokens) / length


def encode(tokenizer: BPETokenizer, split: data.Split) -> torch.Tensor:
    """A whole split as tokens."""
    return torch.tensor([t for i in range(len(split.titles)) for t in tokenizer.encode(split.document(i))])


def save(model: CausalLM, tokenizer: BPETokenizer) -> None:
    """Write the checkpoint under the names that Llama's files have."""
    FOLDER.mkdir(exist_ok=True)
    table, tensors = FAMILIES["llama"].table, {}
    for name, parameter in model.named_parameters():
        row, i = place(name)
        tensors[table[row].replace("{i}", str(i))] = parameter.detach().half().contiguous()
    save_file(tensors, FOLDER / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float16"}  # fmt: skip
    (FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(FOLDER / "tokenizer.json")


def measure() -> dict:
    """Train tokenizer and model, write both, and say how well they do on files they haven't seen."""
    import llmlib.hf.families  # noqa: F401

    torch.set_num_threads(1)
    corpus = data.standard_library()
    texts = [corpus.train.document(i) for i in range(len(corpus.train.titles))]
    tokenizer = BPETokenizer.train(texts, SIZES["vocab_size"])
    model = build()
    train(model, windows(encode(tokenizer, corpus.train)), steps=STEPS, learning_rate=4e-3, warmup=100, progress=True)
    save(model, tokenizer)
    held_out = encode(tokenizer, corpus.validation)
    bits = bits_per_byte(model, held_out, len(corpus.validation))
    return {
        "corpus": corpus.name, "digest": corpus.digest(), "parameters": model.num_parameters(), "steps": STEPS,
        "batch": BATCH, "time": TIME, "validation_bits_per_byte": bits,
        "bytes_per_token": len(corpus.validation) / len(held_out),
    }  # fmt: skip


if __name__ == "__main__":
    with recording("book_model", command="make record CHAPTER=book_model") as record:
        record("model", measure)
