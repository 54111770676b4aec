"""Expert parallelism: two processes, each with half the experts and half the batch, do what one process does."""

import copy
import subprocess
import sys

import pytest
import torch

from llmlib.context import Context
from llmlib.ffn import GLU
from llmlib.model import spec
from llmlib.moe import MoE, TopKRouter, parallelise_experts, reduce_gradients
from llmlib.train import spared_from_decay

OPTIONS = dict(
    num_experts=4, top_k=2, expert=spec(GLU, d_ff=12, bias=True), num_shared_experts=1, bias_update_rate=0.1,
    router=spec(TopKRouter, scoring="sigmoid", norm_topk_prob=True, correction_bias=True),
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_equal_one():
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2, done.stdout


BALANCED = dict(num_experts=4, top_k=2, expert=spec(GLU, d_ff=12), load_balance_alpha=0.5)


def mean_auxiliary_loss_is_one_process_s(mesh, over):
    """And its gradient with respect to the router, for equally many tokens in each."""
    import torch.distributed as dist

    whole = MoE(8, **BALANCED, balance_over=over).double()
    whole.reset_parameters(std=0.5)
    half = copy.deepcopy(whole)
    parallelise_experts(half, mesh)
    assert half.num_idle_parameters() == whole.num_idle_parameters()
    x, rank = torch.randn(2, 9, 8, dtype=torch.float64), mesh.get_local_rank()
    half(x[rank : rank + 1])
    whole(x)
    total = half.auxiliary_loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / 2, whole.auxiliary_loss.detach(), atol=1e-12, rtol=0)
    (half.auxiliary_loss / 2).backward()
    whole.auxiliary_loss.backward()
    reduce_gradients(half, mesh)
    torch.testing.assert_close(half.router.weight.grad, whole.router.weight.grad, atol=1e-12, rtol=0)
    half(x[:, :0] if rank == 0 else x)  # no token here, and nobody waits
    assert (half.auxiliary_loss is None) == (rank == 0)


def padding_is_left_out(half, whole, rank):
    """A process whose batch is padded, and one with nothing but padding."""
    x, valid = torch.randn(2, 2, 6, 8, dtype=torch.float64), torch.zeros(2, 2, 6, dtype=torch.bool)
    valid[0, 0, 2:] = valid[0, 1, 5:] = True
    whole.load.zero_()
    half.load.zero_()
    y = half(x[rank].masked_fill(~valid[rank, ..., None], torch.nan), Context(valid=valid[rank]))
    assert y[~valid[rank]].abs().max() == 0
    expected = whole(x[valid][None])[0]
    torch.testing.assert_close(y[valid[rank]], expected if rank == 0 else expected[:0], atol=1e-12, rtol=0)
    assert half.load.sum() == (10 if rank == 0 else 0)
    half.after_step()
    whole.after_step()
    torch.testing.assert_close(half.router.e_score_correction_bias, whole.router.e_score_correction_bias)


def worker():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from llmlib.errors import ConfigError

    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("experts",))
    rank = mesh.get_local_rank()
    torch.manual_seed(0)
    whole = MoE(8, **OPTIONS).double()
    whole.reset_parameters(std=0.5)
    whole.experts.gate_proj.bias.data.normal_()
    half = MoE(8, **OPTIONS).double()
    half.load_state_dict(whole.state_dict())
    parallelise_experts(half, mesh)
    assert half.experts.up_proj.weight.shape == (2, 12, 8)
    assert {n for n, _ in half.named_parameters() if n.endswith("bias")} <= spared_from_decay(half)
    # uneven on purpose: the second process has fewer tokens, and one expert of the first gets none from it
    x, up = torch.randn(2, 2, 9, 8, dtype=torch.float64).unbind(0)
    mine = slice(0, 1) if rank == 0 else slice(1, 2)
    part = (x[mine] if rank == 0 else x[mine, :5]).clone().requires_grad_()
    y = half(part)
    (y * up[mine, : y.shape[1]]).sum().backward()
    reduce_gradients(half, mesh)

    rows = torch.cat([x[0], x[1, :5]])[None].requires_grad_()
    expected = whole(rows)
    (expected * torch.cat([up[0], up[1, :5]])[None]).sum().backward()
    own = slice(0, 9) if rank == 0 else slice(9, 14)
    torch.testing.assert_close(y[0], expected[0, own], atol=1e-12, rtol=0)
    torch.testing.assert_close(part.grad[0], rows.grad[0, own], atol=1e-12, rtol=0)
    for (name, a), b in zip(half.named_parameters(), whole.parameters(), strict=True):
        wanted = b.grad[2 * rank : 2 * rank + 2] if name.startswith("experts.") else b.grad
        torch.testing.assert_close(a.grad, wanted, atol=1e-12, rtol=0, msg=name)
    half.after_step()
    whole.after_step()
    torch.testing.assert_close(half.router.e_score_correction_bias, whole.router.e_score_correction_bias)

    nothing = half(x[:, :0] if rank == 0 else x[:, :3])  # a process without tokens still serves the others
    torch.testing.assert_close(nothing, whole(x[:, :0] if rank == 0 else x[:, :3]), atol=1e-12, rtol=0)
    for over in ("batch", "sequence"):
        mean_auxiliary_loss_is_one_process_s(mesh, over)
    padding_is_left_out(half, whole, rank)
    five = MoE(8, **{**OPTIONS, "num_experts": 5})
    plane = init_device_mesh("cpu", (1, 2))
    both = torch.nn.ModuleList([MoE(8, **OPTIONS), five])
    with pytest.raises(ConfigError, match="num_experts is 5, and can't be shared out evenly among 2"):
        parallelise_experts(both, mesh)
    assert both[0].exchange is None
    with pytest.raises(ConfigError, match="the 4 experts are shared out already"):
        parallelise_experts(half, mesh)
    with pytest.raises(ConfigError, match="the mesh has 2 dimensions, and must have 1"):
        parallelise_experts(both, plane)
    print("equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    worker()
