"""Quantizing a directory a tensor at a time: the same files' contents as through memory, or nothing at all."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import phicore
from phicore.cli import main
from phicore.formats import streaming
from phicore.formats.bitsandbytes import packed_groups
from phicore.formats.huggingface import load_model, save_model
from phicore.formats.safetensors_files import TensorFile, model_tensors
from phicore.formats.streaming import NotStreamable, quantize_directory
from tests.chat_tokenizers import chat_tokenizer
from tests.spoilt import reshard

IDS = torch.arange(18).view(2, 9)
COMPARED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="module")
def sources(tiny: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directories of tiny models, in files of at most 20 kB, by family and whether head and embedding are tied."""
    made: dict[tuple[str, bool], Path] = {}

    def source(family: str = "llama", tied: bool = False) -> Path:
        if (family, tied) not in made:
            directory = tmp_path_factory.mktemp("source") / "model"
            sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
            model: Any = tiny(family, tied=tied, dtype=torch.float32, attention_bias=True, **sizes)
            save_model(model, chat_tokenizer("smollm2"), directory)
            reshard(directory)
            made[family, tied] = directory
        return made[family, tied]

    return source


@pytest.fixture
def source(sources: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the untied Llama's, to be spoilt."""
    return Path(shutil.copytree(sources(), tmp_path / "source"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def contents(directory: Path) -> dict[str, Tensor]:
    return {key: file.read(key) for key, file in model_tensors(directory).items()}


# ===== the same as through memory =====


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block_size", "double_quant"), [(64, True), (128, False)])
def test_equals_what_is_quantized_in_memory(
    sources: Callable[..., Path],
    tmp_path: Path,
    family: str,
    tied: bool,
    dtype: torch.dtype,
    block_size: int,
    double_quant: bool,
) -> None:
    source, options = sources(family, tied), {"block_size": block_size, "double_quant": double_quant}
    model, tokenizer = load_model(str(source), dtype)
    save_model(phicore.quantize_(model, **options), tokenizer, tmp_path / "memory")
    read, written = quantize_directory(source, tmp_path / "stream", dtype, **options, shard_bytes=30_000)
    ours, expected = contents(tmp_path / "stream"), contents(tmp_path / "memory")
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key
    assert read == sum(tensor.nbytes for tensor in contents(source).values())
    assert written == sum(tensor.nbytes for tensor in ours.values())
    config = json.loads((tmp_path / "stream/config.json").read_text())
    assert config == json.loads((tmp_path / "memory/config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    for name in COMPARED:
        assert (tmp_path / "stream" / name).read_bytes() == (source / name).read_bytes()
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "stream").iterdir()} == {0o644}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_and_bitsandbytes_load_the_files_with_equal_logits(
    sources: Callable[..., Path], tmp_path: Path, tied: bool, double_quant: bool
) -> None:
    quantize_directory(
        sources(tied=tied), tmp_path / "nf4", torch.float32, double_quant=double_quant, shard_bytes=30_000
    )
    assert len(list((tmp_path / "nf4").glob("model-*.safetensors"))) >= 3
    expected: Any = phicore.quantize_(load_model(str(sources(tied=tied)), torch.float32)[0], double_quant=double_quant)
    ours, _ = load_model(str(tmp_path / "nf4"), torch.float32)
    assert torch.equal(logits(ours), logits(expected))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert type(theirs.lm_head) is nn.Linear
    theirs.train()  # in eval mode its CPU forward repacks the weight
    torch.testing.assert_close(logits(theirs), logits(expected), atol=1e-5, rtol=1e-5)


def test_which_layers_is_asked_as_in_quantize(sources: Callable[..., Path], tmp_path: Path) -> None:
    targets, excluded = ["q_proj", "lm_head"], ["layers.0"]
    quantize_directory(sources(), tmp_path / "nf4", torch.float32, targets, excluded)
    coded = {key.split(".weight.")[0] for key in contents(tmp_path / "nf4") if key.endswith(".absmax")}
    expected = phicore.quantize_(load_model(str(sources()), torch.float32)[0], targets, excluded)
    assert coded == {name for name, module in expected.named_modules() if isinstance(module, phicore.NF4Linear)}
    assert coded == {"model.layers.1.self_attn.q_proj", "lm_head"}
    loaded, _ = load_model(str(tmp_path / "nf4"), torch.float32)
    assert torch.equal(logits(loaded), logits(expected))


def test_both_of_two_tied_weights_in_the_files(source: Path, sources: Callable[..., Path], tmp_path: Path) -> None:
    """They stay as they are, and readers decide as they would have: tied if equal."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for name, same in (("differ", False), ("equal", True)):
        if same:
            reshard(
                source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0})
            )
        expected, _ = load_model(str(source), torch.float32)
        assert (expected.lm_head.weight is expected.model.embed_tokens.weight) == same
        phicore.quantize_(expected)
        quantize_directory(source, tmp_path / name, torch.float32)
        loaded, _ = load_model(str(tmp_path / name), torch.float32)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == same
        assert torch.equal(logits(loaded), logits(expected))


def test_a_file_is_held_at_a_time_and_a_weight(sources: Callable[..., Path], tmp_path: Path) -> None:
    """No tensor that was read is alive when two others have been; what is written is never more than a file's."""
    alive: list[weakref.ref[Tensor]] = []
    read = TensorFile.read
    most = 0

    def watched(self: TensorFile, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(t.nbytes for r in alive if (t := r()) is not None))
        return tensor

    source = sources()
    longest = max(file.path.stat().st_size for file in model_tensors(source).values())
    with mock.patch.object(TensorFile, "read", watched):
        quantize_directory(source, tmp_path / "nf4", torch.float32)
    largest = max(tensor.nbytes for tensor in contents(source).values())
    assert most <= 2 * largest  # the head, which is not coded, is held until its file is written
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in (tmp_path / "nf4").glob("*.safetensors")]
    assert max(sizes) <= longest  # whatever SHARD_BYTES would allow
    assert len(sizes) > 1


def test_loading_reads_each_tensor_once_and_keeps_none_beside(sources: Callable[..., Path], tmp_path: Path) -> None:
    quantize_directory(sources(), tmp_path / "nf4", torch.bfloat16)
    names: list[str] = []
    read = TensorFile.read

    def watched(self: TensorFile, name: str) -> Tensor:
        names.append(name)
        return read(self, name)

    with (
        mock.patch.object(TensorFile, "read", watched),
        mock.patch("phicore.nf4.ops.nf4_dequantize", side_effect=AssertionError("decoded")),
    ):
        model, _ = load_model(str(tmp_path / "nf4"), torch.bfloat16)
    assert sorted(names) == sorted(contents(tmp_path / "nf4"))
    own = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
    stored = sum(t.nbytes for key, t in contents(tmp_path / "nf4").items() if "quant_" not in key)
    assert own <= stored + 1000  # and a rotary table


# ===== whole or not at all =====


def test_overwriting_needs_to_be_asked_for(sources: Callable[..., Path], tmp_path: Path) -> None:
    target = tmp_path / "nf4"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    source = sources()  # which may read, where no test before has made it
    with (
        mock.patch.object(TensorFile, "read", side_effect=AssertionError("read in vain")),
        pytest.raises(FileExistsError, match="not an empty directory"),
    ):
        quantize_directory(source, target)
    quantize_directory(source, target, overwrite=True)
    assert not (target / "notes.txt").exists()
    assert list(tmp_path.iterdir()) == [target]


def nothing_is_left(place: Path, *known: Path) -> bool:
    return set(place.iterdir()) == set(known)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_named_and_nothing_is_written(source: Path, tmp_path: Path, bad: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    reshard(source, lambda tensors: tensors[name].view(-1)[5:6].fill_(bad))
    with pytest.raises(ValueError, match=rf"model-.*\.safetensors: {name}: .* holds 1 NaN or Inf"):
        quantize_directory(source, tmp_path / "nf4")
    assert nothing_is_left(tmp_path, source)


def test_a_write_that_fails_leaves_the_old_directory(
    sources: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_directory(sources(), tmp_path / "nf4")
    before = {file.name: file.read_bytes() for file in (tmp_path / "nf4").iterdir()}

    def fail(groups: Iterator[dict[str, Tensor]], directory: Path, _: int) -> int:
        next(groups)
        (directory / "0.part").touch()
        raise OSError("disk full")

    monkeypatch.setattr(streaming, "write_model", fail)
    with pytest.raises(OSError, match="disk full"):
        quantize_directory(sources(), tmp_path / "nf4", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "nf4").iterdir()} == before
    assert nothing_is_left(tmp_path, tmp_path / "nf4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing weights: \['model.norm.weight'\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"another shape.*\[63\] in model-.*, .*\[64\] in"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64).int()}),
            r"or kind: .*model.norm.weight \(torch.int32",
        ),
    ],
)
def test_weights_that_do_not_fit(source: Path, tmp_path: Path, change: Any, message: str) -> None:
    reshard(source, change)
    with pytest.raises(ValueError, match=r"does not fit the model that its config.json describes: .*" + message):
        quantize_directory(source, tmp_path / "nf4")
    assert nothing_is_left(tmp_path, source)


def test_weights_that_the_model_does_not_use_are_left_out_and_said(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reshard(source, lambda tensors: tensors.update(extra=torch.ones(3)))
    quantize_directory(source, tmp_path / "nf4")
    assert "weights that the model does not use, and that are left out: ['extra']" in caplog.text
    assert "extra" not in contents(tmp_path / "nf4")


def test_wishes_that_cannot_be_met(sources: Callable[..., Path], tmp_path: Path) -> None:
    quantize_directory(sources(), tmp_path / "nf4")
    for source, options, message in (
        (tmp_path / "nf4", {}, r"is quantized already \(.*bitsandbytes\); give its full-precision original"),
        (sources(), {"target_modules": ["up_prj"]}, 'no module matches target "up_prj"; did you mean up_proj'),
        (sources(), {"block_size": 48}, "block_size must be one of"),
        (sources(tied=True), {"target_modules": ["lm_head"]}, "lm_head.weight is tied to another weight"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_directory(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


# ===== the command =====


def test_the_command_streams(sources: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "nf4"), "--dtype", "float32", "--block-size", "128", "--no-double-quant"]
    with mock.patch("phicore.formats.huggingface.load_model", side_effect=AssertionError("loaded whole")):
        assert main(["quantize", "--model", str(sources()), *arguments]) == 0
    quantize_directory(sources(), tmp_path / "same", torch.float32, block_size=128, double_quant=False)
    ours, expected = contents(tmp_path / "nf4"), contents(tmp_path / "same")
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())
    assert "before, " in capsys.readouterr().out


def test_names_that_only_transformers_can_map_are_loaded_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixtral's files hold each expert by itself, the model has them in one tensor."""
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    save_model(model, chat_tokenizer("smollm2"), tmp_path / "source")
    with pytest.raises(NotStreamable, match=r"names tensors otherwise than the model, e.g. model.layers.0.block_sp"):
        quantize_directory(tmp_path / "source", tmp_path / "nf4")
    assert nothing_is_left(tmp_path, tmp_path / "source")
    arguments = ["--output", str(tmp_path / "nf4"), "--dtype", "float32"]
    assert main(["quantize", "--model", str(tmp_path / "source"), *arguments]) == 0
    assert "it is loaded whole" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    assert isinstance(theirs.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    expected = phicore.quantize_(load_model(str(tmp_path / "source"), torch.float32)[0])
    theirs.train()
    torch.testing.assert_close(logits(theirs), logits(expected), atol=1e-5, rtol=1e-5)


# ===== dtypes, heads and storage =====


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", ["_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"])
def test_what_transformers_keeps_in_float32_stays_so(
    sources: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, setting: str
) -> None:
    """As a router's bias: written from disk, written from memory, and loaded again."""
    monkeypatch.setattr(transformers.LlamaForCausalLM, setting, {"norm"})
    quantize_directory(sources(), tmp_path / "stream", dtype)
    model, tokenizer = load_model(str(sources()), dtype)
    save_model(phicore.quantize_(model), tokenizer, tmp_path / "memory")
    for directory in (tmp_path / "stream", tmp_path / "memory"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).state_dict()
        ours = load_model(str(directory), dtype)[0].state_dict()
        for key in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"):
            known = (theirs[key], contents(directory)[key], model.state_dict()[key])
            assert {tensor.dtype for tensor in known} == {ours[key].dtype}
            assert torch.equal(ours[key], theirs[key])
    strict = setting.endswith("strict") or dtype == torch.float16
    assert (ours["model.norm.weight"].dtype == torch.float32) == strict


def test_a_value_beyond_float16_is_named(source: Path, tmp_path: Path) -> None:
    reshard(source, lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds values up to 1e\+06, and float16 ends at 65,504"):
        quantize_directory(source, tmp_path / "nf4", torch.float16)
    assert not (tmp_path / "nf4").exists()


def test_a_head_may_be_coded(sources: Callable[..., Path], tmp_path: Path) -> None:
    everything = r".*(proj|lm_head)"
    quantize_directory(sources(), tmp_path / "stream", torch.float32, everything)
    model, tokenizer = load_model(str(sources()), torch.float32)
    save_model(phicore.quantize_(model, everything), tokenizer, tmp_path / "memory")
    ours, _ = load_model(str(tmp_path / "stream"), torch.float32)
    save_model(ours, tokenizer, tmp_path / "again")
    for directory in (tmp_path / "stream", tmp_path / "memory", tmp_path / "again"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        assert type(theirs.lm_head).__name__ == "Linear4bit"
        assert torch.equal(theirs.lm_head.weight.flatten(), ours.lm_head.packed)  # its product wants 32 n rows
        assert contents(directory).keys() == contents(tmp_path / "stream").keys()


def test_codes_that_are_held_as_float32_are_read(sources: Callable[..., Path], tmp_path: Path) -> None:
    """bnb_4bit_quant_storage: four bytes of codes a value."""
    quantize_directory(sources(), tmp_path / "nf4", torch.float32)
    expected = logits(load_model(str(tmp_path / "nf4"), torch.float32)[0])

    def wider(tensors: dict[str, Tensor]) -> None:
        codes = {key: t for key, t in tensors.items() if t.dtype == torch.uint8 and t.dim() == 2}
        tensors.update({key: t.view(-1).view(torch.float32).view(-1, 1) for key, t in codes.items()})

    reshard(tmp_path / "nf4", wider)
    assert torch.equal(logits(load_model(str(tmp_path / "nf4"), torch.float32)[0]), expected)


def test_a_view_of_the_start_of_a_tensor_is_written_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), phicore.NF4Linear.from_linear(nn.Linear(4, 4)))
    model.register_buffer("first", model[0].weight.detach()[:2])
    keys = [key for group in packed_groups(model) for key in group]
    assert {"0.weight", "0.bias", "first"} <= set(keys)
