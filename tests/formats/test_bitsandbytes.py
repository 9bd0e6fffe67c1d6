"""bitsandbytes' 4-bit state: read by bitsandbytes and by us, and refused when it is not what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import phicore
from phicore.formats.bitsandbytes import STATE, pack_weight, quantization_config, unpack_weight
from phicore.formats.huggingface import load_model, save_model
from tests.chat_tokenizers import chat_tokenizer


@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=2),
    double_quant=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    block_size=st.sampled_from([32, 64, 128]),
)
def test_round_trip_and_bitsandbytes_reads_it(
    shape: list[int], double_quant: bool, dtype: torch.dtype, block_size: int
) -> None:
    weight = phicore.nf4.quantize(torch.randn(shape).to(dtype), block_size, double_quant)
    tensors = pack_weight(weight)
    back = unpack_weight(tensors, "w")
    assert (back.shape, back.dtype, back.block_size) == (weight.shape, weight.dtype, weight.block_size)
    assert all(torch.equal(back.parts()[name], part) for name, part in weight.parts().items())
    named = {f"w.{name}": tensor for name, tensor in tensors.items() if name}
    state = bitsandbytes.functional.QuantState.from_dict(named, device=torch.device("cpu"))
    assert (tuple(state.shape), state.dtype, state.blocksize, state.nested) == (
        tuple(shape),
        dtype,
        block_size,
        double_quant,
    )
    if shape[1] % 64 == 0:  # elsewhere its CPU decoding is wrong
        theirs = bitsandbytes.functional.dequantize_4bit(tensors[""], state)
        torch.testing.assert_close(theirs, weight.dequantize())


def test_a_state_that_bitsandbytes_wrote_is_read() -> None:
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(48, 64, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
    )
    tensors = {"": packed} | {key.removeprefix("."): t for key, t in state.as_dict(packed=True).items()}
    tensors = {key.removeprefix("w."): t for key, t in tensors.items()}
    weight = unpack_weight(tensors, "w")
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(weight.dequantize(), theirs)


def test_sixteen_bit_storage_holds_the_same_bytes() -> None:
    weight = phicore.nf4.quantize(torch.randn(16, 64))
    tensors = pack_weight(weight)
    tensors[""] = tensors[""].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(unpack_weight(tensors, "w").packed, weight.packed)


def broken(edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    tensors = pack_weight(phicore.nf4.quantize(torch.randn(16, 64)))
    state = json.loads(bytes(tensors[STATE].tolist()))
    edit(state, tensors)
    if STATE in tensors:
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state, tensors: tensors.pop(STATE), "no 4-bit weight"),
        (lambda state, tensors: tensors.pop("absmax"), "no 4-bit weight"),
        (lambda state, tensors: state.update(quant_type="fp4"), "not NF4's"),
        (lambda state, tensors: tensors["quant_map"].add_(0.1), "not NF4's"),
        (lambda state, tensors: tensors["nested_quant_map"].add_(0.1), "dynamic map"),
        (lambda state, tensors: state.update(nested_blocksize=128), "nested_blocksize"),
        (lambda state, tensors: state.update(shape=[17, 64]), "packed"),
        (lambda state, tensors: state.update(blocksize=48), "block_size must be one of"),
        (lambda state, tensors: state.update(dtype="float31"), "no 4-bit weight"),
    ],
)
def test_what_does_not_fit_is_refused(edit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_weight(broken(edit), "w")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_and_bitsandbytes_load_what_is_written_with_equal_logits(
    tiny: Callable[..., nn.Module], tmp_path: Path, tied: bool, double_quant: bool
) -> None:
    tokenizer = chat_tokenizer("smollm2")
    model: Any = tiny("llama", dtype=torch.float32, tied=tied, vocab_size=300, hidden_size=64, intermediate_size=128)
    phicore.quantize_(model, double_quant=double_quant)
    ids = torch.arange(18).view(2, 9)
    expected = model(ids).logits
    save_model(model, tokenizer, tmp_path / "nf4")
    ours, _ = load_model(str(tmp_path / "nf4"), torch.float32)
    assert torch.equal(ours(ids).logits, expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    theirs.train()  # in eval mode its CPU forward repacks the weight
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_damaged_directory_is_refused(tiny: Callable[..., nn.Module], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model: Any = tiny("llama", dtype=torch.float32, vocab_size=300)
    phicore.quantize_(model)
    save_model(model, chat_tokenizer("smollm2"), tmp_path / "nf4")
    file = tmp_path / "nf4/model.safetensors"
    whole = load_file(file)
    gone = next(key for key in whole if key.endswith("q_proj.weight.absmax"))
    save_file({key: tensor for key, tensor in whole.items() if key != gone}, file)
    with pytest.raises(ValueError, match=r"q_proj\.weight is no 4-bit weight"):
        load_model(str(tmp_path / "nf4"), torch.float32)
    save_file({key: tensor for key, tensor in whole.items() if "model.norm" not in key}, file)
    with pytest.raises(ValueError, match=r"missing: \['model.norm.weight'\]"):
        load_model(str(tmp_path / "nf4"), torch.float32)


def test_configuration_needs_layers_that_are_alike() -> None:
    with pytest.raises(ValueError, match="0 NF4 layers"):
        quantization_config(nn.Linear(4, 4))
    mixed = nn.ModuleList(
        phicore.NF4Linear.from_linear(nn.Linear(64, 4), double_quant=double) for double in (False, True)
    )
    with pytest.raises(ValueError, match="alike in double quantisation"):
        quantization_config(mixed)
