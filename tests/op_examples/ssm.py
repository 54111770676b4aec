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


EXAMPLES = {
    "selective_scan": [scan(), scan(with_state=True, with_D=False)],
    "ssd": [ssd(), ssd(with_state=True, with_D=False), ssd(t=16, g=1)],
    "causal_conv": [conv(), conv(with_history=True, with_bias=False)],
    "state_update": [update_of_mamba, update_of_mamba2],
}
