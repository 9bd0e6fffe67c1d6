"""bitsandbytes' 4-bit state: read by bitsandbytes and by us, and refused when it is not what it says."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import phicore
from phicore.formats.bitsandbytes import (
    STATE,
    cast,
    load_weights,
    name_parts,
    pack_weight,
    packed_groups,
    quantization_config,
    unpack_weight,
)
from phicore.formats.huggingface import load_model, save_model
from phicore.formats.safetensors_files import INDEX, model_tensors, write_model
from tests.chat_tokenizers import chat_tokenizer
from tests.spoilt import VALUES, reshard


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


def test_parts_lie_where_the_weight_does_whatever_the_default_device() -> None:
    weight = phicore.nf4.quantize(torch.randn(8, 64))
    with torch.device("meta"):
        back = unpack_weight(pack_weight(weight), "w")
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_a_state_that_bitsandbytes_wrote_is_read() -> None:
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(48, 64, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
    )
    tensors = {"": packed} | {key.removeprefix("."): t for key, t in state.as_dict(packed=True).items()}
    tensors = {key.removeprefix("w."): t for key, t in tensors.items()}
    weight = unpack_weight(tensors, "w")
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(weight.dequantize(), theirs)


@pytest.mark.parametrize("storage", [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_storage_of_transformers_holds_the_same_bytes(storage: torch.dtype) -> None:
    weight = phicore.nf4.quantize(torch.randn(16, 64))
    tensors = pack_weight(weight)
    tensors[""] = tensors[""].view(-1).view(storage).view(-1, 1)
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
        (lambda state, tensors: state.update(nested_blocksize=128), "nested_blocksize 128; 256 is read"),
        (lambda state, tensors: state.update(nested_dtype="float16"), "nested_dtype 'float16'; float32 is read"),
        (lambda state, tensors: tensors["nested_absmax"].fill_(float("nan")), "w has scales that are NaN or infinite"),
        (lambda state, tensors: tensors["nested_absmax"].fill_(float("inf")), "w has scales that are NaN or infinite"),
        (lambda state, tensors: state.update(shape=[17, 64]), "packed"),
        (lambda state, tensors: state.update(blocksize=48), "block_size must be one of"),
        (lambda state, tensors: state.update(dtype="float31"), "no 4-bit weight.*dtype='float31'"),
        (lambda state, tensors: state.update(dtype="nn"), "no 4-bit weight.*dtype='nn'"),
        (lambda state, tensors: state.update(dtype="float64"), "no 4-bit weight.*dtype='float64'"),
        (lambda state, tensors: state.update(shape=[-16, -64]), "no 4-bit weight.*shape="),
        (lambda state, tensors: state.update(shape=[16.0, 64]), "no 4-bit weight.*shape="),
        (lambda state, tensors: state.update(shape=[2**62, 4]), "no 4-bit weight.*shape="),
        (lambda state, tensors: state.update(nested_offset=float("nan")), "no 4-bit weight.*nested_offset=nan"),
        (lambda state, tensors: state.update(nested_offset=1e39), "no 4-bit weight.*nested_offset=1e"),
        (lambda state, tensors: state.update(nested_offset=10**400), "no 4-bit weight.*nested_offset=1000"),
        (lambda state, tensors: state.update(nested_offset="0"), "no 4-bit weight.*nested_offset='0'"),
        (lambda state, tensors: state.pop("nested_offset"), "no 4-bit weight.*it has absmax, codes, nested_absmax"),
        (lambda state, tensors: tensors.pop("nested_quant_map"), "no 4-bit weight.*it has absmax, codes, nested_abs"),
        (lambda state, tensors: tensors.update(extra=torch.ones(1)), "no 4-bit weight.*it has absmax, codes, extra"),
        (lambda state, tensors: tensors.update({"": tensors[""].long()}), "w is held as torch.int64"),
        (lambda state, tensors: tensors.update({"": tensors[""][:-1]}), r"w: packed of an NF4 weight .*\(511,\)"),
        (lambda state, tensors: tensors.update(absmax=tensors["absmax"].float()), "w: absmax of an NF4 weight"),
        (lambda state, tensors: tensors.update(quant_map=tensors["quant_map"].double()), "not NF4's"),
        (lambda state, tensors: tensors.update(quant_map=tensors["quant_map"][:8]), "not NF4's"),
    ],
)
def test_what_does_not_fit_is_refused(edit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_weight(broken(edit), "w")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"[" * 60_000, b" " * 70_000, '{"blocksize": "\u00e9"}'.encode("latin-1")]
)
def test_a_state_that_is_no_object_is_refused(text: bytes) -> None:
    tensors = pack_weight(phicore.nf4.quantize(torch.randn(16, 64)))
    tensors[STATE] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(ValueError, match="w is no 4-bit weight of bitsandbytes: quant_state"):
        unpack_weight(tensors, "w")
    tensors[STATE] = torch.ones(100)
    with pytest.raises(ValueError, match=r"must be uint8 JSON, is torch.float32 \[100\]"):
        unpack_weight(tensors, "w")


def test_a_state_that_is_far_too_long_is_not_parsed() -> None:
    tensors = pack_weight(phicore.nf4.quantize(torch.randn(16, 64)))
    spaces = torch.full((1000,), ord(" "), dtype=torch.uint8)
    tensors[STATE] = torch.cat([tensors[STATE], spaces])
    unpack_weight(tensors, "w")
    tensors[STATE] = torch.cat([tensors[STATE], spaces.repeat(66)])
    with pytest.raises(ValueError, match=r"must be uint8 JSON, is torch.uint8 \[67"):
        unpack_weight(tensors, "w")


FIELDS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")


@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES | st.lists(st.integers(-9, 70)), min_size=1))
def test_any_state_gives_an_error_or_a_weight(changes: dict[str, Any]) -> None:
    tensors = broken(lambda state, tensors: state.update(changes))
    try:
        weight = unpack_weight(tensors, "w")
    except ValueError as error:
        message = str(error)
    else:
        assert weight.dequantize().shape == weight.shape
        return
    assert message.startswith("w ") or message.startswith("w:")


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


# ===== directories =====


@pytest.fixture(scope="module")
def coded(tiny: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in NF4, in several files."""
    directory = tmp_path_factory.mktemp("model") / "nf4"
    model: Any = tiny("llama", dtype=torch.float32, attention_bias=True, vocab_size=300)
    save_model(phicore.quantize_(model), chat_tokenizer("smollm2"), directory)
    reshard(directory)
    return directory


Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight.absmax"), rf"safetensors: {Q}.weight is no 4-bit weight of .*: it has codes, "),
        (lambda t: t.pop(f"{Q}.weight"), rf"{Q}.weight is no 4-bit weight of bitsandbytes: it has absmax"),
        (lambda t: t.pop(f"{Q}.weight.{STATE}"), r"missing: \['" + f"{Q}.weight|unlike: .*{Q}.weight"),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1]}), f"safetensors: {Q}.weight: packed of an NF4"),
        (lambda t: t.update({f"{Q}.weight.absmax": t[f"{Q}.weight.absmax"].float()}), f"{Q}.weight: absmax of an NF4"),
        (lambda t: [t.update({k.replace("q_proj", "p_proj"): t[k]}) for k in list(t) if "0.self_attn.q_proj.w" in k],
         "p_proj.weight is a 4-bit weight, and the model has no linear layer of that name; .*give the full-prec"),
        (lambda t: [t.update({k.replace(Q, "model.norm"): t[k]}) for k in list(t) if f"{Q}.w" in k],
         "model.norm.weight is a 4-bit weight, and the model has no linear layer"),
        (lambda t: [t.update({k: t[k.replace("q_proj", "v_proj")]}) for k in list(t) if f"{Q}.w" in k],
         rf"{Q}.weight is a 4-bit weight of shape \[16, 32\], the model's is \[32, 32\]"),
        (lambda t: t.pop(NORM), r"missing: \['model.norm.weight'\]"),
        (lambda t: t.pop(f"{Q}.bias"), rf"missing: \['{Q}.bias'\]"),
        (lambda t: t.update(extra=t.pop(NORM)), r"unexpected: \['extra'\]; .*full-prec"),
        (lambda t: t.update({"p_proj.weight.absmax": torch.ones(1)}), r"unexpected: \['p_proj.weight.absmax'\]"),
        (lambda t: t.update({f"p_proj.weight.{STATE}x": torch.ones(1)}), r"unexpected: \['p_proj.weight.quant_state"),
        (lambda t: t.update({f"{Q}.weight.extra": torch.ones(1)}), rf"unexpected: \['{Q}.weight.extra'\]"),
        (lambda t: t.update({NORM: torch.ones(31)}), r"unlike: .*model.norm.weight \(torch.float32 \[31\] in model-"),
        (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int32)}), "unlike: .*model.norm.weight .torch.int32"),
    ],
)  # fmt: skip
def test_a_directory_that_does_not_fit_is_refused_and_the_model_unchanged(
    coded: Path,
    tmp_path: Path,
    unchanged: Callable[..., Any],
    tiny: Callable[..., nn.Module],
    change: Any,
    message: str,
) -> None:
    directory = Path(shutil.copytree(coded, tmp_path / "nf4"))
    reshard(directory, change)
    with pytest.raises(ValueError, match=message):
        load_model(str(directory), torch.float32)
    model: Any = tiny("llama", dtype=torch.float32, attention_bias=True, vocab_size=300)
    with unchanged(model), pytest.raises(ValueError, match=message):
        load_weights(model, model_tensors(directory), torch.float32)


def test_tensors_that_the_model_does_not_use_are_named_and_left_out(
    coded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the files are not quantized; 1e6 would be refused in float16 if it were read."""
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "score.weight": torch.full((2, 32), 1e6)}
    unused |= name_parts("mtp.up_proj.weight", phicore.nf4.quantize(torch.randn(64, 32)))
    directory = Path(shutil.copytree(coded, tmp_path / "nf4"))
    reshard(directory, lambda t: t.update(unused))
    with pytest.raises(ValueError, match=r"mtp.up_proj.weight is a 4-bit weight, and the model has no linear layer"):
        load_model(str(directory), torch.float16)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    loaded, _ = load_model(str(directory), torch.float16)
    expected, _ = load_model(str(coded), torch.float16)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("phicore")]
    assert message == f"{directory}: weights that the model does not use: {sorted(unused)[:10]}"


def test_a_coded_weight_that_the_model_ties_is_refused(
    coded: Path, tiny: Callable[..., nn.Module], unchanged: Callable[..., Any], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(coded, tmp_path / "nf4"))
    reshard(directory, lambda t: t.update(name_parts("lm_head.weight", phicore.nf4.quantize(torch.randn(300, 32)))))
    model: Any = tiny("llama", tied=True, dtype=torch.float32, attention_bias=True, vocab_size=300)
    with unchanged(model), pytest.raises(ValueError, match="is a 4-bit weight, and the model ties it"):
        load_weights(model, model_tensors(directory), torch.float32)


@given(data=st.data())
def test_spoilt_files_give_an_error_or_the_model(
    coded: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Callable[..., nn.Module],
    unchanged: Callable[..., Any],
    data: st.DataObject,
) -> None:
    """A byte of any file that is flipped, or a file that is cut: ValueError or OSError, and an unchanged model."""
    directory = Path(shutil.copytree(coded, tmp_path_factory.mktemp("spoilt") / "nf4"))
    path = data.draw(st.sampled_from(sorted([*directory.glob("*.safetensors"), directory / INDEX])))
    whole = path.read_bytes()
    header = min(8 + int.from_bytes(whole[:8], "little"), len(whole))
    where = st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(where)])
    else:
        at, patch = data.draw(where), data.draw(st.binary(min_size=1, max_size=4))
        path.write_bytes((whole[:at] + patch + whole[at + len(patch) :])[: len(whole)])
    model: Any = tiny("llama", dtype=torch.float32, attention_bias=True, vocab_size=300)
    modules = list(model.modules())
    try:
        with unchanged(model):
            try:
                load_weights(model, model_tensors(directory), torch.float32)
            except (ValueError, OSError) as error:
                message = str(error)
            else:
                raise StopIteration
    except StopIteration:
        assert len([m for m in model.modules() if m not in modules]) == 14
        return
    assert message


@given(data=st.data())
def test_a_spoilt_configuration_gives_an_error_or_a_model(
    coded: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = Path(shutil.copytree(coded, tmp_path_factory.mktemp("spoilt") / "nf4"))
    config = json.loads((directory / "config.json").read_text())
    place = data.draw(st.sampled_from([config, config, config["quantization_config"]]))
    large = st.sampled_from([0, 1, 10**5, 10**9, 2**70])
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(VALUES | large)
    (directory / "config.json").write_text(json.dumps(config))
    try:
        model, _ = load_model(str(directory), torch.float32)
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        assert model.get_input_embeddings().weight.shape == (300, 32)
        return
    assert message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "describes 1000000000 layers, its files hold"),
        ("intermediate_size", 10**7, "describes .* weights, its files hold .* bytes"),
        ("hidden_size", 10**12, "."),
        ("num_hidden_layers", "2", "."),
        ("num_attention_heads", 0, "."),
    ],
)
def test_a_configuration_of_a_larger_model_takes_no_memory(
    coded: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    directory = Path(shutil.copytree(coded, tmp_path / "nf4"))
    config = json.loads((directory / "config.json").read_text()) | {field: value}
    (directory / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        load_model(str(directory), torch.float32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000  # kB


EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("source", [*EIGHT_BITS, torch.float8_e8m0fnu, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_tensor_of_any_floating_dtype_is_cast(source: torch.dtype, dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.0, 2.0, 128.0]).to(source)
    assert torch.equal(cast(tensor, dtype, "w"), torch.tensor([1.0, 2.0, 128.0], dtype=dtype))
    if dtype == torch.float16 and source not in EIGHT_BITS:
        with pytest.raises(ValueError, match=r"w holds values up to 1\.31\de\+05, and float16 ends at 65,504; choose"):
            cast(torch.tensor([1.0, 2.0**17]).to(source), dtype, "w")


def test_configuration_needs_layers_that_are_alike() -> None:
    with pytest.raises(ValueError, match="0 NF4 layers"):
        quantization_config(nn.Linear(4, 4))
    mixed = nn.ModuleList(
        phicore.NF4Linear.from_linear(nn.Linear(64, 4), double_quant=double) for double in (False, True)
    )
    with pytest.raises(ValueError, match="alike in double quantisation"):
        quantization_config(mixed)


@pytest.mark.parametrize("coded", [["inner.0", "again"], ["inner.2", "more"]])
def test_a_layer_that_stands_in_two_places_is_stored_once_and_loaded_into_both(
    tmp_path: Path, coded: list[str]
) -> None:
    """One of the layers coded to NF4 and one dense, each in two places."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        first, other = nn.Linear(64, 64), nn.Linear(64, 64)
        return nn.ModuleDict({"inner": nn.Sequential(first, nn.Tanh(), other), "again": first, "more": other}).eval()

    model = phicore.quantize_(build(), target_modules=coded)
    write_model(packed_groups(model), tmp_path)
    fresh = build()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    load_weights(fresh, model_tensors(tmp_path), torch.float32)
    assert fresh["again"] is fresh["inner"][0]
    assert fresh["more"] is fresh["inner"][2]
    assert isinstance(fresh.get_submodule(coded[0]), phicore.NF4Linear)
    x = torch.randn(3, 64)
    for name in ("inner", "again", "more"):
        assert torch.equal(fresh[name](x), model[name](x))
