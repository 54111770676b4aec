"""Inputs on which each op of `llmlib.attention` is compared with its twins."""

import torch


def heads(b=2, h=4, g=None, t=9, s=None, d=16, e=None, mask=None, bias=None, sinks=False, **options):
    """mask and bias name shapes in the letters b, h, t, s and 1; a mask leaves the very first query nothing to see."""

    def example(dtype, device):
        sizes = {"b": b, "h": h, "t": t, "s": s or t, "1": 1}
        q = torch.randn(b, h, t, d).to(device, dtype)
        k, v = (torch.randn(b, g or h, s or t, w).to(device, dtype) for w in (d, e or d))
        more = dict(options)
        if mask is not None:
            more["mask"] = torch.rand([sizes[c] for c in mask], device=device) < 0.6
            more["mask"].flatten(0, -2)[0] = False
        if bias is not None:
            more["bias"] = torch.randn([sizes[c] for c in bias], device=device).to(dtype)
        if sinks:
            more["sinks"] = torch.randn(h).to(device, dtype)
        return (q, k, v), more

    return example


def path(h=4, g=None, t=9, s=None, d=8, e=None, mask=False, gates=False, **options):
    """Directions of length 1 and 0 < β < 2; where s > t the first keys come from earlier text."""

    def example(dtype, device):
        g_, s_ = g or h, s or t
        sizes = (2, h, t, d), (2, g_, s_, d), (2, g_, s_, e or d), (2, g_, t, d)
        q, k, v, w = (torch.randn(size).to(device, dtype) for size in sizes)
        beta = (2 * torch.rand(2, g_, t)).to(device, dtype)
        forget = [-torch.rand(2, h, s_).to(device, dtype)] if gates else []
        more = {"mask": torch.rand(2, 1, t, s_, device=device) < 0.7} if mask else {}
        return (q, k, v, w / w.norm(dim=-1, keepdim=True), beta, *forget), more | options

    return example


def sparse(c=1, t=9, s=None, n=2, block_size=3, **options):
    """The last query's choice leaves out its own block, and with a mask of False the first sees nothing."""

    def example(dtype, device):
        (q, k, v), more = heads(g=2, t=t, s=s, **options)(dtype, device)
        blocks = -(-k.shape[2] // block_size)
        chosen = torch.rand(q.shape[0], c, t, blocks, device=device).argsort(-1)[..., :n]
        chosen[:, :, -1] = torch.arange(n, device=device)
        return (q, k, v, chosen), more | {"block_size": block_size}

    return example


def summaries(t=9, length=9, block_size=4, stride=2):
    """The first queries see no block that has ended."""

    def example(dtype, device):
        n = max(0, (length - block_size) // stride + 1)
        (q, k, v), _ = heads(g=2, t=t, s=n or 1)(dtype, device)
        return (q, k[:, :, :n], v[:, :, :n]), {"length": length, "block_size": block_size, "stride": stride}

    return example


def indexer(dtype, device):
    q, k, weights = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 9, 8), torch.randn(2, 3, 5)
    return tuple(x.to(device, dtype) for x in (q, k, weights)), {}


def blocks(t=9, s=None, block_size=3):
    """The last block is cut, unless s is a multiple of block_size."""

    def example(dtype, device):
        (q, k, _), _ = heads(g=2, t=t, s=s)(dtype, device)
        return (q, k, block_size), {}

    return example


EXAMPLES = {
    "attention": [
        heads(),
        heads(g=2),
        heads(g=1, t=70, scale=0.5),
        heads(causal=False, s=13),
        heads(causal=False, t=5, s=3),
        heads(causal=False, t=7, s=3, window=4),
        heads(causal=False, t=7, s=3, window=7),
        heads(scale=-0.5),
        heads(scale=0.0, g=2),
        heads(g=2, t=4, s=11),
        heads(g=2, t=1, s=11),
        heads(d=24, e=16, g=2),
        heads(d=16, e=24),
        heads(d=24, e=16, t=1, s=9, g=1),
        heads(window=3),
        heads(g=2, window=1),
        heads(g=2, window=4, t=3, s=12),
        heads(window=4, t=1, s=12, g=2),
        heads(window=3, causal=False),
        heads(t=300, window=64, d=8, h=2),
        heads(t=257, window=20, d=8, g=2),
        heads(t=283, window=70, d=8, e=12, g=1, b=1),
        heads(mask="b1ts", g=2),
        heads(mask="ts"),
        heads(mask="hts", g=2),
        heads(mask="bh1s", t=1, s=7, g=2),
        heads(mask="b11s", t=1, s=7, g=2),
        heads(mask="bh11", t=1, s=7, g=2),
        heads(bias="hts", g=2),
        heads(bias="1h1s", causal=False),
        heads(bias="bhts", mask="b1ts", window=4),
        heads(bias="h1s", t=1, s=6, g=2),
        heads(bias="h11", t=1, s=6, g=2),
        heads(sinks=True, g=2),
        heads(sinks=True, mask="b1ts", window=4),
        heads(softcap=2.0),
    ],
    "path_attention": [
        path(),
        path(g=2, gates=True, e=6),
        path(g=1, t=5, s=12, mask=True, gates=True, chunk_size=2),
        path(t=1, s=7, scale=0.5),
    ],
    "selected_attention": [
        sparse(),
        sparse(c=2, t=4, s=11),
        sparse(c=4, t=1, s=11, scale=0.5),
        sparse(n=4, block_size=1, mask="b1ts"),
    ],
    "compressed_attention": [
        summaries(),
        summaries(t=1, length=12),
        summaries(t=3, length=3),
        summaries(length=20, block_size=3, stride=3),
    ],
    "index_scores": [indexer],
    "mean_key_scores": [blocks(), blocks(t=1, s=11), blocks(t=2, s=2)],
}
