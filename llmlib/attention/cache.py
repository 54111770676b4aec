"""Caches: what attention keeps of the tokens it has seen, in the layer's `state`; one interface, `update`."""

import sys

import torch
from jaxtyping import Int, Num
from torch import Tensor

from llmlib.errors import require, require_state


def tokens_seen(state: dict | None) -> int:
    """How many tokens an attention layer's state holds; ValueError where it is that of a layer of another kind."""
    if state is None or "length" in state:
        return 0 if state is None else state["length"]
    require_state(state, ("length",), "attention")
    return 0


def _require_same_text(state: dict, new: dict[str, Tensor], slots: range) -> None:
    """Raise ValueError where another layer or another batch filled the state: it might broadcast in silence.

    slots  how many tokens the buffers may have room for
    """
    for name, value in new.items():
        if name not in state and "length" not in state:
            continue
        held = state.get(name)
        fits = held is not None and held.is_floating_point() == value.is_floating_point()
        require(
            fits and (*held.shape[:2], held.shape[3]) == (*value.shape[:2], value.shape[3]) and held.shape[2] in slots,
            f"state[{name!r}] {'is missing' if held is None else f'is {held.dtype} of shape {tuple(held.shape)}'}, and "
            f"this layer with this batch adds {value.dtype} of shape {tuple(value.shape)}: "
            f"is it the state of another layer or another batch?",
            ValueError,
        )


class GrowingCache:
    """Keeps every token. Buffers are preallocated and double when full; `state["reserve"]` sizes the first ones.

    state[name] is (b g capacity ·), filled up to state["length"], both in tokens. ValueError for the state of another
    layer or batch.
    """

    def update(self, state: dict, **new: Num[Tensor, "b _ t _"]) -> tuple[Num[Tensor, "b _ s _"], ...]:
        """Append each tensor, and return all of each that the new queries may look at, oldest first."""
        seen = state.get("length", 0)
        _require_same_text(state, new, range(seen, sys.maxsize))
        length = seen + next(iter(new.values())).shape[2]
        for name, value in new.items():
            if name not in state or state[name].shape[2] < length:
                state[name] = self._grown(state, name, value, seen, length)
            state[name][:, :, seen:length] = value
        state["length"] = length
        return tuple(state[name][:, :, :length] for name in new)

    @staticmethod
    def _grown(state: dict, name: str, value: Tensor, seen: int, length: int) -> Tensor:
        old = state.get(name)
        capacity = max(length, state.get("reserve", 0) if old is None else 2 * old.shape[2])
        buffer = value.new_empty(*value.shape[:2], capacity, value.shape[3])
        if old is not None:
            buffer[:, :, :seen] = old[:, :, :seen]
        return buffer

    def index(self, length: int, t: int, s: int, device: torch.device) -> Int[Tensor, "s"]:
        """Where in the text each of the s keys stands that `update` returned for t new tokens."""
        return torch.arange(length - s, length, device=device)


class RingCache(GrowingCache):
    """Keeps the last `window` tokens in a ring: token i lives in slot i mod window, whatever the length of the text.

    state[name] is (b g window ·). Jiang et al., "Mistral 7B", arXiv:2310.06825, the rolling buffer.
    """

    def __init__(self, window: int):
        self.window = window

    def update(self, state: dict, **new: Num[Tensor, "b _ t _"]) -> tuple[Num[Tensor, "b _ s _"], ...]:
        """Store the new tokens; return the keys in view. For one token they come as they lie, not oldest first."""
        seen, w = state.get("length", 0), self.window
        _require_same_text(state, new, range(w, w + 1))
        t = next(iter(new.values())).shape[2]
        for name, value in new.items():
            if name not in state:
                state[name] = value.new_empty(*value.shape[:2], w, value.shape[3])
        if t == 1:
            for name, value in new.items():
                state[name][:, :, seen % w] = value[:, :, 0]
            view = tuple(state[name][:, :, : seen + 1] for name in new)
        else:
            view = tuple(self._extend(state[name], value, seen) for name, value in new.items())
        state["length"] = seen + t
        return view

    def _extend(self, ring: Tensor, value: Tensor, seen: int) -> Tensor:
        w, t = self.window, value.shape[2]
        old = torch.arange(max(0, seen - w + 1), seen, device=ring.device) % w
        view = torch.cat([ring[:, :, old], value], dim=2)
        kept = min(t, w)
        ring[:, :, torch.arange(seen + t - kept, seen + t, device=ring.device) % w] = value[:, :, t - kept :]
        return view

    def index(self, length: int, t: int, s: int, device: torch.device) -> Int[Tensor, "s"]:
        """Where in the text each key stands that `update` returned; slots, not an order, when t is 1."""
        if t > 1:
            return super().index(length, t, s, device)
        return length - 1 - (length - 1 - torch.arange(s, device=device)) % self.window


class Int8Cache:
    """Keeps 8-bit integers and one scale per token and head over another cache: x ≈ scale · round(x / scale).

    scale = max|x| / 127, so the error is at most scale / 2 in each number. Integer tensors are kept as they are.
    """

    def __init__(self, inner: GrowingCache):
        self.inner = inner

    def update(self, state: dict, **new: Num[Tensor, "b _ t _"]) -> tuple[Num[Tensor, "b _ s _"], ...]:
        """Quantise and store; return everything in view, dequantised."""
        stored = {}
        for name, value in new.items():
            if value.is_floating_point():
                value, stored[f"{name}_scale"] = quantise(value)
            stored[name] = value
        view = dict(zip(stored, self.inner.update(state, **stored), strict=True))
        return tuple(
            (view[name] * view[f"{name}_scale"]).to(new[name].dtype) if f"{name}_scale" in view else view[name]
            for name in new
        )

    def index(self, length: int, t: int, s: int, device: torch.device) -> Int[Tensor, "s"]:
        """See the cache underneath."""
        return self.inner.index(length, t, s, device)


def quantise(x: Num[Tensor, "b g t d"]) -> tuple[Num[Tensor, "b g t d"], Num[Tensor, "b g t 1"]]:
    """(int8 values, float32 scale per row): the row's largest number becomes ±127."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-8) / 127
    return torch.round(x / scale).to(torch.int8), scale


CACHES = {"float": lambda cache: cache, "int8": Int8Cache}


def make_cache(window: int | None, kind: str):
    """The cache for a layer: a ring under a window, and `kind` says how numbers are kept."""
    return CACHES[kind](GrowingCache() if window is None else RingCache(window))


def part_of(state: dict, name: str, reserve: int | None = None) -> dict:
    """The dict inside a layer's state for a second cache; it reserves as much as the layer's own unless told."""
    return state.setdefault(name, {"reserve": state.get("reserve", 0) if reserve is None else reserve})


def cache_bytes(state: dict) -> int:
    """Bytes allocated by one layer's state."""
    tensors = sum(x.numel() * x.element_size() for x in state.values() if isinstance(x, Tensor))
    return tensors + sum(cache_bytes(x) for x in state.values() if isinstance(x, dict))
