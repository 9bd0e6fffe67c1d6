"""What a training step will hold in memory on each rank, counted without weights and without a step."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from phicore.training.config import TrainConfig
from phicore.training.cross_entropy import chunk_elements
from phicore.training.recompute import blocks, checkpointed_blocks
from phicore.zero.optimizer import BUCKET_BYTES


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes on the fullest rank.

    Attributes:
        frozen: weights and buffers that do not train.
        trained: parameters that do.
        gradients: of these, with what is on its way between ranks.
        optimizer: AdamW's two moments, with float32 masters of 16-bit parameters; a rank's share.
        activations: what the forward pass of one micro-batch keeps for the backward pass.
        loss: one block of logits and its gradient.
        checkpoint: what one checkpoint of all ranks takes on disk.
        sent: to other ranks in a step.
        examples: of a micro-batch.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    checkpoint: int
    sent: int
    examples: int

    @property
    def total(self) -> int:
        """What is held at once, at least: temporaries of one layer and the process itself come on top."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.activations + self.loss


def step_memory(
    model: nn.Module,
    config: TrainConfig,
    length: int,
    ranks: int = 1,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
) -> StepMemory:
    """Counts what one step of a Trainer holds on each of some ranks.

    Weights, gradients and optimizer state are exact. Activations are what autograd saves in a forward pass over shapes
    alone, without padding: every example is taken to have `length` tokens. Where a model computes otherwise over real
    tensors than over shapes (grouped heads that torch's attention repeats itself), that is a few percent too much.

    Args:
        model: as it will train, adapters attached, on the meta device. It is of no use afterwards.
        config: batch_size, accumulation, zero_stage and gradient_checkpointing are read.
        length: tokens of an example.
        ranks: how many share a step.
        forward: maps (model, input_ids [B, length]) to whatever the backward pass starts from; by default the model is
            called as a causal language model of transformers, whose head runs on the last token alone.

    Raises:
        ValueError: fewer than one token or rank; gradient_checkpointing for a model without repeated blocks.
    """
    if length < 1 or ranks < 1:
        raise ValueError(f"length and ranks must be at least 1, got {length} and {ranks}")
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    held = sum(t.nbytes for t in [*parameters, *model.buffers()])
    elements = sum(p.numel() for p in trained)
    halves = sum(p.numel() for p in trained if p.element_size() == 2)
    trained_bytes = sum(p.nbytes for p in trained)
    share = math.ceil(elements / ranks)
    examples = math.ceil(math.ceil(config.batch_size / ranks) / config.accumulation)
    passes = config.accumulation if config.zero_stage == 2 else 1  # that are reduced on their own
    head = getattr(model, "get_output_embeddings", lambda: None)()
    classes = head.weight.shape[0] if head is not None else 0
    logits = min(examples * length * classes, chunk_elements(torch.device("cpu")))
    return StepMemory(
        frozen=held - trained_bytes,
        trained=trained_bytes,
        gradients=_gradients(trained_bytes, share, ranks, config.zero_stage),
        optimizer=8 * share + 4 * math.ceil(halves / ranks),
        activations=saved_bytes(model, examples, length, config.gradient_checkpointing, forward),
        loss=2 * 4 * logits,
        checkpoint=trained_bytes + 8 * elements + 4 * halves,
        sent=trained_bytes * (passes + 1) * (ranks - 1) // ranks,
        examples=examples,
    )


def _gradients(trained_bytes: int, share: int, ranks: int, stage: int) -> int:
    if ranks == 1:
        return trained_bytes
    on_the_way = min(2 * BUCKET_BYTES, 2 * trained_bytes)  # a bucket that fills, and one that is sent
    return on_the_way + (trained_bytes + 4 * share if stage == 1 else 4 * share)


def saved_bytes(
    model: nn.Module,
    examples: int,
    length: int,
    checkpointing: bool = False,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
) -> int:
    """Bytes that autograd keeps between a forward pass over input_ids [examples, length] and its backward pass, beside
    parameters and buffers. With gradient checkpointing: the blocks' inputs, and what one block keeps while its backward
    pass runs. The model must be on the meta device, and is of no use afterwards."""
    run = forward or _last_token
    with FakeTensorMode(), _Answers():
        _give_shapes(model)
        model.train()
        whole, _ = _kept(model, run, examples, length)
        if not checkpointing:
            return whole
        with checkpointed_blocks(model):
            outside, inputs = _kept(model, run, examples, length)
    return outside + inputs + math.ceil((whole - outside) / len(blocks(model)))


def _last_token(model: nn.Module, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=False, logits_to_keep=1)


class _Answers(TorchDispatchMode):
    """Answers "no" where a model asks for a value, of which shapes have none: DoRA asks whether a norm cancelled. And
    for the products of experts, of which torch knows the shape in bfloat16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        if func is torch.ops.aten._grouped_mm.default:
            tokens, experts = args[:2]  # [n, in], [experts, in, out]
            return tokens.new_empty(len(tokens), experts.shape[-1])
        return func(*args, **(kwargs or {}))


def _give_shapes(model: nn.Module) -> None:
    """Puts tensors of the CPU without values in the place of those of the meta device; what was tied stays so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if table is module._parameters else empty
                    )
                table[name] = made[id(tensor)]  # type: ignore[assignment]


def _kept(model: nn.Module, run: Callable[[nn.Module, Tensor], Any], examples: int, length: int) -> tuple[int, int]:
    """Bytes that autograd saves, each storage counted once, and bytes of the blocks' first inputs."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Any] = {}  # the storages themselves: one that is freed may leave its address to another
    inputs: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append(sum(t.nbytes for t in given if isinstance(t, Tensor)))

    with contextlib.ExitStack() as stack:
        if any(isinstance(module, nn.ModuleList) for module in model.modules()):
            for block in blocks(model):
                stack.callback(block.register_forward_pre_hook(note).remove)
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        run(model, torch.zeros(examples, length, dtype=torch.long))
    return sum(storage.nbytes() for storage in saved.values()), sum(inputs)
