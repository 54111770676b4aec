"""A language model inside the page: its weights, packed for `introduction.js`, which computes the logits there."""

import base64
import string

import torch
from torch import Tensor

from llmlib.interactive import embed, widget
from llmlib.model import CausalLM
from llmlib.notebook.experiments.introduction import pocket, quantise

PROMPT = "    def __init__(self"
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


def pack(model: CausalLM) -> dict:
    """Sizes, and each weight: of a matrix one character per number and a scale per row, of a vector float32."""
    attention, config = model.layers[0].mixer, model.config
    sizes = {
        "d": config.d_model, "layers": len(config.layers), "heads": attention.num_heads, "vocab": config.vocab_size,
        "f": model.layers[0].ffn.up_proj.out_features, "theta": config.layers[0].mixer.options["rope_theta"],
        "eps": config.norm(1).eps, "context": config.max_seq_len,
    }  # fmt: skip
    return sizes | {"weights": {name: _pack(weight.detach()) for name, weight in model.named_parameters()}}


def _pack(weight: Tensor) -> dict:
    if weight.ndim == 1:
        return {"values": _text(weight.float())}
    whole, scale = quantise(weight)
    letters = "".join(LETTERS[i] for i in (whole + 31).flatten().tolist())
    return {"letters": letters, "scale": _text(scale)}


def _text(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def unpack(packed: dict) -> CausalLM:
    """The model that `pack` was given, with the weights that 6 bits keep."""

    def read(text: str, dtype) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)

    def restore(part: dict) -> Tensor:
        if "values" in part:
            return read(part["values"], torch.float32)
        scale = read(part["scale"], torch.float32)
        whole = torch.tensor([LETTERS.index(letter) - 31 for letter in part["letters"]])
        return whole.view(len(scale), -1) * scale[:, None]

    model = CausalLM(pocket())
    model.load_state_dict({name: restore(part) for name, part in packed["weights"].items()})
    return model.eval()


def figure(packed: dict, prompt: str = PROMPT, *, live: bool = False, **traits):
    """The figure of chapter 00: type a text, see what comes next, let the model write; `live` makes it a widget."""
    state = {"model": packed, "text": prompt, "temperature": 0.7, "top_k": 256, "top_p": 1.0, "seed": 0} | traits
    if live:
        return widget("introduction", **state)
    return embed("introduction", state, height=640, title="A language model in this page")
