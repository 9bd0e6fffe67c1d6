"""What a step is said to hold is what one holds: counts over shapes beside real models, optimizers, checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import phicore
from phicore import TrainConfig, Trainer
from phicore.formats.huggingface import meta_model
from phicore.training.memory import saved_bytes, step_memory

Tiny = Callable[..., nn.Module]
METHODS = ("lora", "dora", "qlora", "qdora", "full")


def prepare(model: Any, method: str) -> Any:
    if method.startswith("q"):
        phicore.quantize_(model)
    if method == "full":
        return model.requires_grad_(True)
    config = phicore.LoRAConfig(rank=2, alpha=4, dora=method.endswith("dora"), adapter_dtype=torch.float32)
    return phicore.attach(model, config)


def pair(tiny: Tiny, family: str, method: str) -> tuple[Any, Any]:
    """A model with weights and the same without, both ready to train."""
    real: Any = tiny(family, dtype=torch.float32)
    if family == "mixtral":
        real.set_experts_implementation("grouped_mm")  # as in a model that is loaded
    return prepare(real, method).train(), prepare(meta_model(real.config), method)


def really_saved(model: nn.Module, examples: int, length: int) -> int:
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=torch.zeros(examples, length, dtype=torch.long), use_cache=False, logits_to_keep=1)
        return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", "lora"), ("gpt2", "dora"), *((family, m) for family in ("tied llama", "mixtral") for m in METHODS)],
)
def test_activations_over_shapes_are_those_of_a_real_pass(tiny: Tiny, family: str, method: str) -> None:
    real, shapes = pair(tiny, family, method)
    counted, held = saved_bytes(shapes, 3, 16), really_saved(real, 3, 16)
    if family == "gpt2":
        assert counted == held
    else:  # over shapes, transformers repeats the grouped heads itself
        assert held <= counted <= 1.15 * held


def test_weights_that_a_model_draws_on_the_cpu_are_on_meta_too() -> None:
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    model = meta_model(transformers.DiffLlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    assert all(p.is_meta for p in model.parameters())
    assert step_memory(prepare(model, "qlora"), TrainConfig(batch_size=2), 8).activations > 0


@pytest.mark.parametrize("method", METHODS)
def test_weights_optimizer_and_checkpoint_are_those_of_a_real_run(tiny: Tiny, method: str, tmp_path: Path) -> None:
    real, shapes = pair(tiny, "tied llama", method)
    config = TrainConfig(output=str(tmp_path), steps=1, batch_size=2)
    found = step_memory(shapes, config, 8)
    tensors = {id(t): t for t in [*real.parameters(), *real.buffers()]}.values()
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert found.frozen == sum(t.nbytes for t in tensors) - trained
    assert found.trained == found.gradients == trained
    trainer = Trainer(real, config, [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2)
    trainer.fit()
    states = trainer.optimizer.state.values()
    moments = sum(value.nbytes for state in states for value in state.values() if value.dim())
    assert found.optimizer == moments
    files = [*tmp_path.glob("checkpoints/step-*/*.safetensors")]
    assert len(files) == 1
    held = [t for t in load_file(files[0]).values() if t.is_floating_point() and t.dim()]  # no states, no step counts
    assert sum(t.nbytes for t in held) == found.checkpoint


def test_masters_of_16_bit_parameters_are_counted() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)).to("meta", torch.bfloat16)
    found = step_memory(model, TrainConfig(batch_size=1), 4, forward=lambda network, ids: network(ids))
    assert found.trained == 2 * 72
    assert found.optimizer == 12 * 72
    assert found.checkpoint == 14 * 72


def test_ranks_share_state_and_stage_2_shares_gradients(tiny: Tiny) -> None:
    def count(ranks: int, **settings: Any) -> Any:
        return step_memory(pair(tiny, "llama", "full")[1], TrainConfig(batch_size=8, **settings), 8, ranks)

    alone, one, two = count(1), count(4, zero_stage=1), count(4, zero_stage=2, accumulation=2)
    psi = alone.trained // 4
    assert one.optimizer == two.optimizer == alone.optimizer // 4 == 2 * psi
    assert one.gradients - two.gradients == alone.trained
    assert (alone.sent, one.sent, two.sent) == (0, 2 * alone.trained * 3 // 4, 3 * alone.trained * 3 // 4)
    assert (alone.examples, one.examples, two.examples) == (8, 2, 1)
    assert one.activations * 4 == pytest.approx(alone.activations, rel=0.05)


def test_recomputed_blocks_keep_their_inputs_and_one_block(tiny: Tiny) -> None:
    def count(checkpointing: bool) -> int:
        config = TrainConfig(batch_size=2, gradient_checkpointing=checkpointing)
        return step_memory(meta(), config, 16).activations

    def meta() -> Any:
        real: Any = tiny("llama", dtype=torch.float32, num_hidden_layers=4)
        return prepare(meta_model(real.config), "lora")

    whole, recomputed = count(False), count(True)
    inputs = 4 * 2 * 16 * 32 * 4
    assert inputs + whole / 4 < recomputed < inputs + whole / 4 + 0.2 * whole


@pytest.mark.parametrize(("length", "ranks"), [(0, 1), (8, 0)])
def test_no_tokens_or_no_ranks_are_refused(tiny: Tiny, length: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        step_memory(pair(tiny, "llama", "lora")[1], TrainConfig(), length, ranks)
