"""Adapted models under DDP and FSDP2: the gradients of two ranks are those of one process."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import phicore
from phicore.formats.peft import WEIGHTS, adapter_tensors
from tests.adapters.any_model import Drawn
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
        phicore.quantize_(model, exclude_modules=["2"])
    config = phicore.LoRAConfig(rank=4, alpha=7, dora=dora, target_modules=["up", "down"], modules_to_save=["2"])
    phicore.attach(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def compare(dora: bool, nf4: bool, how: str) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    alone, model = build(dora, nf4), build(dora, nf4)
    same_gradients(alone, model, model[:2], x, how)


def same_gradients(
    alone: nn.Module, model: nn.Module, blocks: Iterable[nn.Module | list[nn.Module]], x: Tensor, how: str
) -> None:
    """On each rank: half of the rows through the wrapped model, all of them through one that is not."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loss = alone(x).square().mean()
    loss.backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    wrapped: nn.Module = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    mine = wrapped(x[rank::world_size]).square().mean()
    mine.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        whole = gradient if how == "ddp" else gradient.full_tensor()
        torch.testing.assert_close(whole, expected[name])


def load_sharded(meta: bool) -> None:
    """A state that is loaded into a sharded DoRA model, whether it was made with its values or without."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    expected = build(True, False)
    with torch.device("meta" if meta else "cpu"):
        model = build(True, False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model[:2]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if meta:
        model.to_empty(device="cpu")
    set_model_state_dict(model, expected.state_dict(), options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(model(x), expected(x))


ATTENTION = ("attention", True, False, False)
FUSED = ("fused", True, False, False)
EXPERTS = ("experts", False, False, False)
LINEAR = ("linear", True, False, False)
TIED = {"target_modules": ["embed", "plain"], "ensure_weight_tying": True}
KINDS = {  # name -> layers of the model, and what adapts them
    "attention": ((ATTENTION,), {"target_modules": ["mha"]}),
    "parts": ((FUSED,), {"target_modules": ["q_proj", "v_proj"], "fused_targets": "split"}),
    "experts": ((LINEAR, EXPERTS), {"target_modules": ["plain"], "target_parameters": ["up", "down"]}),
    "tied": ((LINEAR,), TIED),
    "rows": ((LINEAR,), {"target_modules": ["plain"], "trainable_token_indices": [3, 7, 5]}),
    "biases": ((FUSED, LINEAR), {"target_modules": ["plain"], "bias": "all"}),
}


def drawn(kind: str, dora: bool) -> nn.Module:
    layers, options = KINDS[kind]
    case = Drawn(layers, kind in ("tied", "rows"), True, {"rank": 2, "alpha": 3, "dora": dora, **options})
    torch.manual_seed(0)
    model = phicore.attach(case.build(), case.config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def compare_kind(kind: str, dora: bool, how: str) -> None:
    alone, model = drawn(kind, dora), drawn(kind, dora)
    x = torch.randint(0, 12, (8, 4), generator=torch.Generator().manual_seed(3))
    # torch wants what shares parameters in one group.
    tied = [[model.embed, model.head]] if kind in ("tied", "rows") else []
    same_gradients(alone, model, [*model.layers, *tied], x, how)


def compare_all_kinds(dora: bool, how: str) -> None:
    for kind in KINDS:
        compare_kind(kind, dora, how)


def attach_to_wrapped() -> None:
    """Ranks would train an adapter each, on their own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = phicore.LoRAConfig(rank=2)
    with pytest.raises(ValueError, match=r"the model is a DistributedDataParallel, .* attach first"):
        phicore.attach(DistributedDataParallel(Block()), config)
    with pytest.raises(ValueError, match=r"0 is a FSDPModule, .* attach first"):
        phicore.attach(nn.Sequential(fully_shard(Block(), mesh=mesh)), config)


def compiled_blocks(model: nn.Sequential) -> nn.Sequential:
    for place, block in enumerate(model):
        model[place] = checkpoint_wrapper(torch.compile(block))
    return model


def save_wrapped(directory: Path) -> None:
    """A file holds the names and tensors of the model, not of its wrappers and shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    path = directory / str(dist.get_rank())
    for dora in (False, True):
        expected = adapter_tensors(build(dora, False))
        for wrap in (DistributedDataParallel, torch.compile, partial(fully_shard, mesh=mesh), compiled_blocks):
            wrapped: Any = wrap(build(dora, False))
            phicore.save_adapter(wrapped, path)
            found = load_file(path / WEIGHTS)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
            if not isinstance(wrapped, FSDPModule):
                assert phicore.load_adapter(wrapped, path) is wrapped
                continue
            for change in (phicore.merge, lambda model: phicore.load_adapter(model, path)):
                with pytest.raises(ValueError, match=r"is a FSDPModule, whose weights are in parts on ranks"):
                    change(wrapped)
    flattened = FullyShardedDataParallel(build(True, False), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the model is a FullyShardedDataParallel, which holds parts .* fully_shard"):
        phicore.save_adapter(flattened, path)
    whole = build(True, False)
    whole.load_state_dict(get_model_state_dict(flattened, options=StateDictOptions(full_state_dict=True)))
    bare = nn.Sequential(Block(), Block(), nn.Linear(64, 8))
    with pytest.raises(ValueError, match=r"the model is a DistributedDataParallel, .* attach first"):
        phicore.load_adapter(DistributedDataParallel(bare), path)
    phicore.load_adapter(torch.compile(compiled_blocks(bare)), path)
    phicore.save_adapter(bare, path)
    assert load_file(path / WEIGHTS).keys() == expected.keys()
    assert isinstance(bare[0], CheckpointWrapper)


@pytest.fixture(scope="module")
def started():
    groups: list[Ranks] = []
    yield groups
    for group in groups:
        group.stop()


@pytest.fixture
def ranks(started, tmp_path_factory):
    if not started or started[-1].broken:
        started.append(Ranks(2, tmp_path_factory.mktemp("ranks")))
    return started[-1]


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("dora", "nf4"), METHODS)
def test_two_ranks_have_the_gradients_of_one_process(ranks, how, dora, nf4):
    ranks(compare, dora, nf4, how)


def test_a_wrapped_model_takes_no_adapter(ranks):
    ranks(attach_to_wrapped)


def test_a_wrapped_model_is_saved_by_its_own_names(ranks, tmp_path):
    ranks(save_wrapped, tmp_path)


@pytest.mark.parametrize("meta", [False, True])
def test_a_state_is_loaded_into_sharded_dora(ranks, meta):
    ranks(load_sharded, meta)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_of_each_kind(ranks, kind):
    for dora in (False, True) if kind not in ("rows", "biases") else (False,):
        ranks(compare_kind, kind, dora, "fsdp2")


def test_ddp_of_each_kind(ranks):
    ranks(compare_all_kinds, True, "ddp")
