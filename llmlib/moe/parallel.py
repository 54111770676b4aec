"""Expert parallelism: each process holds some of the experts, and rows travel to theirs and back."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlib.errors import require
from llmlib.moe.experts import StackedLinear
from llmlib.moe.gated import run_experts
from llmlib.moe.layer import MoE


class _AllToAll(torch.autograd.Function):
    """Send `sizes_in[r]` rows to each process r and receive `sizes_out[r]`; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx, rows, sizes_in, sizes_out, group):
        ctx.back = sizes_out, sizes_in, group
        received = rows.new_empty(sum(sizes_out), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), sizes_out, sizes_in, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient):
        return _AllToAll.apply(gradient, *ctx.back), None, None, None


class Exchange:
    """What stands between router and experts when they live in several processes: two all-to-alls."""

    def __init__(self, mesh):
        self.mesh, self.group, self.world = mesh, mesh.get_group(), mesh.size()

    def __call__(
        self, experts: nn.Module, rows: Float[Tensor, "m d"], counts: Int[Tensor, "E"]
    ) -> Float[Tensor, "m d"]:
        """`run_experts`, with the rows of every process; both are sorted by expert, here by process too."""
        sent = counts.view(self.world, -1)
        came = _AllToAll.apply(sent, [1] * self.world, [1] * self.world, self.group)
        sizes = sent.sum(1).tolist(), came.sum(1).tolist()
        rows = _AllToAll.apply(rows, *sizes, self.group)
        local = torch.arange(came.shape[1], device=rows.device).repeat(self.world)
        order = local.repeat_interleave(came.flatten()).argsort(stable=True)
        done = run_experts(experts, rows.index_select(0, order), came.sum(0))
        return _AllToAll.apply(done.index_select(0, order.argsort()), *sizes[::-1], self.group)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total


def parallelise_experts(module: nn.Module, mesh) -> None:
    """Keep in this process only its share of each mixture's experts; `mesh` is a one-dimensional device mesh.

    Every process calls this on the same weights and then works on its own batch. An expert's gradient holds what the
    tokens of all processes ask for; those of all other parameters are summed by `reduce_gradients`.

    The load that balance is measured on, over the batch, and the loss-free bias's are those of all processes; with
    equally many tokens in each, padding aside, the mean of the auxiliary losses is that of one process with all of
    them. A capacity and expert choice look at the tokens of their own process alone.
    Raises ConfigError when the mesh has another number of dimensions, the processes don't divide the experts, or a
    mixture is shared out already; nothing has changed then. GShard, arXiv:2006.16668.
    """
    require(mesh.ndim == 1, f"the mesh has {mesh.ndim} dimensions, and must have 1: take one by its name, mesh['name']")
    world, rank = mesh.size(), mesh.get_local_rank()
    mixtures = [m for m in module.modules() if isinstance(m, MoE)]
    for moe in mixtures:
        require(moe.exchange is None, f"the {moe.num_experts} experts are shared out already: call this once")
        require(
            moe.num_experts % world == 0,
            f"num_experts is {moe.num_experts}, and can't be shared out evenly among {world} processes",
        )
    for moe in mixtures:
        share = moe.num_experts // world
        for linear in [m for m in moe.experts.modules() if isinstance(m, StackedLinear)]:
            for name, parameter in list(linear.named_parameters()):
                mine = nn.Parameter(parameter.detach()[rank * share : (rank + 1) * share].clone())
                mine.__dict__.update(parameter.__dict__, expert_parallel=True)
                setattr(linear, name, mine)
        moe.exchange = Exchange(mesh)


def reduce_gradients(module: nn.Module, mesh) -> None:
    """Sum over the processes the gradients of what each of them holds a copy of: everything but the experts.

    That is the gradient of the sum of the processes' losses; divide by their number for the mean.
    """
    for parameter in module.parameters():
        if parameter.grad is not None and not getattr(parameter, "expert_parallel", False):
            dist.all_reduce(parameter.grad, group=mesh.get_group())
