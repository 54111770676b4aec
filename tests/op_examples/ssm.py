"""Inputs of every op in llmlib.ssm, for the test that holds each twin against its reference."""

import torch


def _random(dtype, device, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def _steps(dtype, device, *shape, seed=1):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.01).to(device, _wide(dtype))


def _decays(dtype, device, *shape):
    count = torch.arange(1, torch.Size(shape).numel() + 1, device=device, dtype=_wide(dtype)).view(shape)
    return -count / count.max()


def scan(with_state=False, with_D=True, t=37, d=16, n=8):
    def example(dtype, device):
        x, B, C, D, h = _random(dtype, device, (2, t, d), (2, t, n), (2, t, n), (d,), (2, d, n))
        args = (x, _steps(dtype, device, 2, t, d), _decays(dtype, device, d, n), B, C, D.to(_wide(dtype)))
        options = {"initial_state": h.to(_wide(dtype)), "return_state": True} if with_state else {}
        return args if with_D else args[:-1], options

    return example


def ssd(with_state=False, with_D=True, t=37, h=4, p=16, g=2, n=16, chunk_size=16):
    def example(dtype, device):
        x, B, C, D, s = _random(dtype, device, (2, t, h, p), (2, t, g, n), (2, t, g, n), (h,), (2, h, p, n))
        args = (x, _steps(dtype, device, 2, t, h), _decays(dtype, device, h), B, C, D.to(_wide(dtype)))
        options = {"initial_state": s.to(_wide(dtype)), "return_state": True} if with_state else {}
        return args if with_D else args[:-1], {"chunk_size": chunk_size, **options}

    return example


def conv(with_history=False, with_bias=True, t=20, d=16, width=4):
    def example(dtype, device):
        x, weight, bias, history = _random(dtype, device, (2, t, d), (d, width), (d,), (2, width - 1, d))
        return (x, weight, *([bias] if with_bias else [])), {"history": history} if with_history else {}

    return example


def update_of_mamba(dtype, device):
    x, B, C, D, h = _random(dtype, device, (2, 1, 16), (2, 1, 8), (2, 1, 8), (1, 16), (2, 1, 16, 8))
    wide = _wide(dtype)
    args = (x, _steps(dtype, device, 2, 1, 16), _decays(dtype, device, 1, 16, 8), B, C, D.to(wide))
    return args, {"state": h.to(wide)}


def update_of_mamba2(dtype, device):
    x, B, C, D, h = _random(dtype, device, (2, 4, 16), (2, 2, 16), (2, 2, 16), (4, 1), (2, 4, 16, 16))
    wide = _wide(dtype)
    args = (x, _steps(dtype, device, 2, 4, 1), _decays(dtype, device, 4, 1, 1), B, C, D.to(wide))
    return args, {"state": h.to(wide)}


def recurrence(with_state=False, t=150, g=1, h=2, r=1, m=1, p=8, n=8, chunk_size=80):
    def example(dtype, device):
        wide = _wide(dtype)  # its callers widen their inputs
        q, k, v, s = _random(wide, device, (2, t, g, r, n), (2, t, g, m, n), (2, t, h, m, p), (2, h, p, n))
        options = {"state": s} if with_state else {}
        return (q, k, v, -_steps(dtype, device, 2, t, h)), {"chunk_size": chunk_size, **options}

    return example


def mamba3(with_state=False, rank=1, t=21, h=4, p=16, g=2, n=16, angles=4):
    def example(dtype, device):
        wide = _wide(dtype)
        x, B, C, trap, angle = _random(
            dtype, device, (2, t, h, rank, p), (2, t, g, rank, n), (2, t, g, rank, n), (2, t, h), (2, t, angles)
        )
        biases = [w.to(wide) for w in _random(dtype, device, (h, rank, n), (h, rank, n), (h,), seed=2)]
        dt, A = _steps(dtype, device, 2, t, h), -_steps(dtype, device, 2, t, h, seed=3)
        options = {"chunk_size": 16}
        if with_state:
            shapes = (2, h, angles), (2, h, p, n), (2, h, rank, n), (2, h, rank, p)
            state = tuple(w.to(wide) for w in _random(dtype, device, *shapes, seed=4))
            options |= {"initial_state": state, "return_state": True}
        return (x, dt, A, trap, B, C, *biases[:2], angle, biases[2]), options

    return example


def delta(with_state=False, t=37, h=2, d=16, e=16):
    def example(dtype, device):
        q, k, v, S = _random(dtype, device, (2, t, h, d), (2, t, h, d), (2, t, h, e), (2, h, e, d))
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(k.dtype)
        beta, log_decay = _steps(dtype, device, 2, t, h), -_steps(dtype, device, 2, t, h, seed=3)
        options = {"initial_state": S.to(_wide(dtype)), "return_state": True} if with_state else {}
        return (q, k, v, beta, log_decay), options

    return example


EXAMPLES = {
    "chunked_recurrence": [recurrence(), recurrence(with_state=True, g=2, h=4, r=3, m=2), recurrence(t=5)],
    "mamba3_scan": [mamba3(), mamba3(with_state=True), mamba3(rank=2)],
    "gated_delta_rule": [delta(), delta(with_state=True)],
    "selective_scan": [scan(), scan(with_state=True, with_D=False)],
    "ssd": [ssd(), ssd(with_state=True, with_D=False), ssd(t=16, g=1)],
    "causal_conv": [conv(), conv(with_history=True, with_bias=False)],
    "state_update": [update_of_mamba, update_of_mamba2],
}
