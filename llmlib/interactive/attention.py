"""The interactive of chapter 01: queries and keys on a plane, and the weights they give."""

import torch
from jaxtyping import Float
from torch import Tensor

from llmlib.attention import masked_softmax, visible
from llmlib.interactive import embed, widget

START = {
    "tokens": ["the", "cat", "sat", "on", "a", "mat"],
    "q": [[0.4, 0.3], [-0.6, 1.2], [1.3, 0.8], [-1.5, -1.2], [0.3, -0.5], [-1.8, 1.6]],
    "k": [[-0.9, -0.4], [1.9, 1.7], [-1.6, 1.5], [0.6, -1.9], [-0.5, -0.9], [1.2, -0.6]],
    "query": "2",
    "temperature": 1.0,
    "mask": "causal",
    "sink": False,
    "sink_logit": 1.0,
}
WINDOW = 3


def weights(state: dict) -> Float[Tensor, "t s"]:
    """What the view shows: softmax(q kᵀ / (√2 · temperature)) under its mask; a sink's share is the last column."""
    q, k = (torch.tensor(state[name], dtype=torch.float64) for name in ("q", "k"))
    scores = q @ k.T / (2**0.5 * state["temperature"])
    allowed = visible(len(q), len(k), state["mask"] != "none", WINDOW if state["mask"] == "window" else None)
    sinks = torch.tensor([state["sink_logit"] / state["temperature"]], dtype=torch.float64) if state["sink"] else None
    found = masked_softmax(scores[None, None], allowed, sinks)[0, 0]
    return found if sinks is None else torch.cat([found, 1 - found.sum(1, keepdim=True)], 1)


def figure(live: bool = False, **changes):
    """The interactive, in the page, or as a live widget whose traits are the keys of START."""
    state = START | changes
    if live:
        return widget("attention", **state)
    return embed("attention", state, height=620, title="Queries meet keys")
