"""Adapted models under DDP and FSDP2: the gradients of two ranks are those of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import phicore
from tests.zero.ranks import Ranks

METHODS = [(dora, nf4) for dora in (False, True) for nf4 in (False, True)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def build(dora: bool, nf4: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(64, 8))
    if nf4:
        phicore.quantize_(model)
    config = phicore.LoRAConfig(rank=4, alpha=7, dora=dora, target_modules=["up", "down"], modules_to_save=["2"])
    phicore.attach(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def compare(dora: bool, nf4: bool, how: str) -> None:
    """On each rank: half of the rows through the wrapped model, all of them through one that is not."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    alone = build(dora, nf4)
    loss = alone(x).square().mean()
    loss.backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    model = build(dora, nf4)
    wrapped: nn.Module = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model[:2]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    mine = wrapped(x[rank::world_size]).square().mean()
    mine.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        whole = gradient if how == "ddp" else gradient.full_tensor()
        torch.testing.assert_close(whole, expected[name])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("dora", "nf4"), METHODS)
def test_two_ranks_have_the_gradients_of_one_process(ranks, how, dora, nf4):
    ranks(compare, dora, nf4, how)
