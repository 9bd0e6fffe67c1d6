"""Gradient checkpointing: the same gradients from fewer kept activations, and a model that is restored."""

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import phicore
from phicore.training.data import collate
from phicore.training.loss import causal_lm_loss
from phicore.training.recompute import blocks, checkpointed_blocks
from tests.training.small_run import examples

Build = Callable[..., nn.Module]


def adapted_llama(tiny: Build, randomize: Build, *, dora: bool, dropout: float) -> nn.Module:
    """A Llama in NF4 with an adapter whose B is not zero."""
    model = phicore.quantize_(tiny("llama", dtype=torch.float32))
    config = phicore.LoRAConfig(rank=3, alpha=7.0, dora=dora, dropout=dropout)
    return randomize(phicore.attach(model, config)).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss, _ = causal_lm_loss(model, collate(examples(4, vocabulary=48), pad_id=0))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapter_gradients_are_the_same(
    tiny: Build, randomize: Build, unchanged: Callable[..., Any], dora: bool, dropout: float
) -> None:
    model = adapted_llama(tiny, randomize, dora=dora, dropout=dropout)
    exact = gradients(model)
    assert exact.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.count_nonzero() for gradient in exact.values())
    with unchanged(model), checkpointed_blocks(model):
        given = gradients(model)
    assert given.keys() == exact.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_no_cache_is_filled_twice_by_a_model_that_only_hands_use_cache_on(randomize: Build) -> None:
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.GraniteMoeConfig(**sizes, num_attention_heads=4, num_local_experts=4, num_experts_per_tok=2)
    model = randomize(phicore.attach(transformers.GraniteMoeForCausalLM(config), phicore.LoRAConfig(rank=3))).train()
    exact = gradients(model)
    with checkpointed_blocks(model):
        given = gradients(model)
    assert given.keys() == exact.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(given[name], gradient, msg=name)


def test_activations_are_computed_again_and_not_kept(
    tiny: Build, randomize: Build, saved_for_backward: Callable[..., list[Tensor]]
) -> None:
    model: Any = adapted_llama(tiny, randomize, dora=False, dropout=0.0)
    batch = collate(examples(4, vocabulary=48), pad_id=0)
    calls: list[nn.Module] = []
    for layer in model.model.layers:
        # Before its forward: the second one ends as soon as it has what the backward pass needs.
        layer.mlp.register_forward_pre_hook(lambda module, _inputs: calls.append(module))

    def loss() -> Tensor:
        return causal_lm_loss(model, batch)[0]

    def size(tensors: list[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    n = len(model.model.layers)
    kept = size(saved_for_backward(loss, model))
    calls.clear()
    loss().backward()
    assert len(calls) == n
    with checkpointed_blocks(model):
        kept_less = size(saved_for_backward(loss, model))
        calls.clear()
        loss().backward()
    assert len(calls) == 2 * n
    assert set(calls) == {layer.mlp for layer in model.model.layers}
    assert kept_less < kept / 3
    calls.clear()
    loss().backward()
    assert len(calls) == n  # outside, everything is as before


def test_compiled_blocks_are_compiled_still(tiny: Build, randomize: Build) -> None:
    """To one graph for both, with the gradients of blocks that are not."""
    torch._dynamo.reset()
    model: Any = adapted_llama(tiny, randomize, dora=True, dropout=0.0)
    model.enable_input_require_grads()  # else the first block is another, whose input has no gradient
    exact = gradients(model)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(backend=counter)
    with checkpointed_blocks(model):
        given = gradients(model)
    assert counter.frame_count == 1
    for name, gradient in exact.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_without_gradients_nothing_is_computed_twice(tiny: Build) -> None:
    model: Any = tiny("llama")
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad():
        expected = model(ids).logits
        with checkpointed_blocks(model):
            assert torch.equal(model(ids).logits, expected)
    assert len(calls) == 2


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_means_move_once(momentum: float | None) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Tanh()) for _ in range(2)]
    layers[1].append(nn.BatchNorm1d(4, track_running_stats=False))
    model: Any = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    exact = copy.deepcopy(model)
    kept = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    for _ in range(3):
        x = torch.randn(5, 4)
        for each in (model, exact):
            with checkpointed_blocks(each) if each is model else nullcontext():
                functools.reduce(lambda h, layer: layer(h), each["layers"], x).square().sum().backward()
    assert kept == {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    for (name, given), expected in zip(model.state_dict().items(), exact.state_dict().values(), strict=True):
        assert torch.equal(given, expected), name
    for given, expected in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(given.grad, expected.grad)


def test_a_block_in_two_places_is_recomputed_once_for_each(toy: Build) -> None:
    model: Any = toy(shared=True)
    x = torch.randn(5, 10, dtype=torch.float64)
    calls: list[int] = []
    model.blocks[0].up_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    model(x).sum().backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert len(calls) == 2
    with checkpointed_blocks(model):
        model(x).sum().backward()
    assert len(calls) == 2 + 2 * 2
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_forward_that_others_put_in_place_is_called_and_put_back(toy: Build) -> None:
    """accelerate hooks into a module by an attribute `forward`."""
    model: Any = toy()
    block = model.blocks[0]
    calls: list[int] = []
    own = block.forward

    def hooked(x: Tensor) -> Tensor:
        calls.append(1)
        return own(x)

    block.forward = hooked
    with checkpointed_blocks(model):
        model(torch.randn(5, 10, dtype=torch.float64)).sum().backward()
    assert len(calls) == 2
    assert block.__dict__["forward"] is hooked
    assert "forward" not in model.blocks[1].__dict__


def test_the_model_is_restored_after_an_error(toy: Build) -> None:
    model: Any = toy()
    with pytest.raises(RuntimeError, match="out of memory"), checkpointed_blocks(model):  # noqa: PT012
        assert all("forward" in vars(block) for block in model.blocks)
        raise RuntimeError("out of memory")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_blocks_are_those_of_the_largest_list() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.ModuleList()
            self.heads = nn.ModuleList([nn.Linear(4, 4)])  # more than the biases of the layers
            self.layers = nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])

    model = Model()
    assert blocks(model) == list(model.layers)
    # An NF4 layer's weight is no parameter, and counts all the same.
    assert blocks(phicore.quantize_(model, target_modules=["layers.0", "layers.1"])) == list(model.layers)


def test_a_model_without_repeated_blocks_is_refused() -> None:
    for model in (nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"empty": nn.ModuleList()})):
        with pytest.raises(ValueError, match=rf"nn\.ModuleList; {type(model).__name__} has none.*turn the option off"):
            blocks(model)
