"""Adapters of PEFT's format that are not right: an error that names what is wrong, and the model as it was."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import phicore
from phicore.adapters import DoRALinear, LoRALinear, adapter_layers
from phicore.formats.peft import CONFIG, PREFIX, WEIGHTS
from phicore.formats.peft_parts import with_metadata
from tests.formats.peft_files import assert_same_files, edit, edit_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory, toy, randomize) -> Path:
    """A DoRA adapter of a Toy with a head trained whole."""
    directory = tmp_path_factory.mktemp("saved")
    config = phicore.LoRAConfig(rank=3, alpha=7, dora=True, modules_to_save=["head"])
    phicore.save_adapter(randomize(phicore.attach(toy(), config)), directory)
    return directory


@pytest.fixture
def spoiled(saved, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture(params=["fresh", "attached"])
def refused(request, toy, unchanged):
    """Loads into a model, with or without the adapter, and expects an error that leaves it unchanged."""

    def check(directory: Path, message: str, error: type[Exception] = ValueError) -> None:
        model = toy(seed=4)
        if request.param == "attached":
            phicore.attach(model, phicore.LoRAConfig(rank=3, alpha=7, dora=True, modules_to_save=["head"]))
        with unchanged(model), pytest.raises(error, match=message):
            phicore.load_adapter(model, directory)

    return check


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file(spoiled, refused, name):
    (spoiled / name).unlink()
    refused(spoiled, f"holds no {name}", FileNotFoundError)
    refused(spoiled / "nowhere", "is no directory on this machine", FileNotFoundError)


def test_a_truncated_file(spoiled, refused):
    data = (spoiled / WEIGHTS).read_bytes()
    (spoiled / WEIGHTS).write_bytes(data[:-1])
    refused(spoiled, "is not a whole safetensors file")


def test_a_pickled_adapter_is_not_read_and_it_is_said_what_to_do(spoiled, refused):
    (spoiled / WEIGHTS).rename(spoiled / "adapter_model.bin")
    refused(spoiled, f"holds no {WEIGHTS}; weights saved by pickle.*save_pretrained writes safe", FileNotFoundError)


def test_a_spoilt_tensor_is_named(spoiled, refused):
    data = (spoiled / WEIGHTS).read_bytes()
    (spoiled / WEIGHTS).write_bytes(data.replace(b'"shape":[3,10]', b'"shape":[3,11]', 1))
    refused(spoiled, rf"{WEIGHTS} is not a whole .*: tensor {PREFIX}embed\.lora_A\.weight has 240 bytes, but F64")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e5m2])
def test_what_is_not_finite_is_named(spoiled, refused, part, bad, dtype):
    def spoil(tensors):
        tensors[f"{PREFIX}embed.{part}"].view(-1)[3] = bad
        return {key: tensor.to(dtype) for key, tensor in tensors.items()}

    edit_tensors(spoiled, spoil)
    refused(spoiled, rf"{WEIGHTS} holds NaN or infinity, in {PREFIX}embed\.{part}: its run diverged")


def test_a_module_saved_whole_may_hold_infinities_and_no_nan(spoiled, refused, toy):
    edit_tensors(spoiled, lambda tensors: tensors | {PREFIX + "head.bias": torch.full((7,), -float("inf")).double()})
    assert phicore.load_adapter(toy(seed=4), spoiled)(torch.ones(1, 10, dtype=torch.float64)).isinf().all()
    edit_tensors(spoiled, lambda tensors: tensors | {PREFIX + "head.bias": torch.full((7,), float("nan")).double()})
    refused(spoiled, rf"holds NaN or infinity, in {PREFIX}head\.bias")


def test_an_adapter_that_is_not_finite_does_not_replace_one_that_is(saved, spoiled, toy):
    model = phicore.load_adapter(toy(), spoiled)
    with torch.no_grad():
        model.embed.lora_B[1, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"nothing is written: the adapter \"default\" holds NaN .*embed\.lora_B\.weight"
    ):
        phicore.save_adapter(model, spoiled)
    assert_same_files(saved, spoiled)


@pytest.mark.parametrize("text", ['{"peft_type": "LORA", "peft_type": "LORA"}', "[" * 100_000, '{"r": 1' + "0" * 5000])
def test_a_configuration_that_misuses_json(spoiled, refused, text):
    (spoiled / CONFIG).write_text(text)
    refused(spoiled, f"{CONFIG}: .*(twice|too deep|integer string)")


@pytest.mark.parametrize("rank", [0, -1, 10**9, 2**70])
@pytest.mark.parametrize("field", ["r", "rank_pattern"])
def test_a_rank_that_the_tensors_do_not_have_takes_no_memory(spoiled, refused, field, rank):
    edit(spoiled, **{field: rank if field == "r" else {"embed": rank}})
    refused(spoiled, "rank|lora_A.weight: |r of embed: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": -8}, f"{CONFIG}: .*above 0, got lora_alpha=-8"),
        (
            {"alpha_pattern": {"embed": 0}},
            r"adapter.*alpha_pattern\['embed'\] must be a number above 0, got 0|alpha of embed: 0 in",
        ),
        (
            {"trainable_token_indices": {"embed": [2, 2]}},
            r"adapter.*trainable_token_indices.* one comes twice|token_indices.*\[2, 2\]\}? in the file",
        ),
    ],
)
def test_values_that_peft_takes_and_we_do_not_are_named_with_their_file(spoiled, refused, fields, message):
    edit(spoiled, **fields)
    refused(spoiled, message)


def loads(model, directory: Path, unchanged) -> bool:
    """Whether an adapter loads; where it does not, a ValueError says so and the model is unchanged."""
    try:
        with unchanged(model):
            try:
                phicore.load_adapter(model, directory)
            except ValueError:
                return False
            raise StopIteration  # past the comparison
    except StopIteration:
        return True


@given(data=st.data())
def test_cut_or_corrupt_bytes_give_an_error_or_the_tensors(saved, tmp_path_factory, toy, unchanged, data):
    whole = (saved / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    where = st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1))  # half of them in the header
    if data.draw(st.booleans()):
        spoilt = whole[: data.draw(where)]
    else:
        at, patch = data.draw(where), data.draw(st.binary(min_size=1, max_size=4))
        spoilt = (whole[:at] + patch + whole[at + len(patch) :])[: len(whole)]
    directory = tmp_path_factory.mktemp("spoilt")
    shutil.copy(saved / CONFIG, directory)
    (directory / WEIGHTS).write_bytes(spoilt)
    model = toy(seed=4)
    if loads(model, directory, unchanged):  # then by the right keys and shapes
        stored = load_file(directory / WEIGHTS)
        assert stored.keys() == load_file(saved / WEIGHTS).keys()
        for path, layer in adapter_layers(model):
            if hasattr(layer, "lora_A"):
                expected = stored[f"{PREFIX}{path}.lora_A.weight"]
                assert torch.equal(layer.lora_A.to(expected.dtype), expected) or expected.isnan().any()


@given(data=st.data())
def test_a_spoilt_configuration_gives_an_error_or_an_adapter(saved, tmp_path_factory, toy, unchanged, data):
    """A value of a wrong type, or bytes that are not JSON: a ValueError, never another exception."""
    directory = tmp_path_factory.mktemp("spoilt")
    shutil.copy(saved / WEIGHTS, directory)
    config = json.loads((saved / CONFIG).read_text())
    if data.draw(st.integers(0, 3)):
        scalars = st.one_of(
            st.none(), st.booleans(), st.integers(-3, 20), st.floats(allow_nan=True), st.text(max_size=4)
        )
        values = st.one_of(
            scalars, st.lists(scalars, max_size=2), st.dictionaries(st.text(max_size=3), scalars, max_size=2)
        )
        config[data.draw(st.sampled_from(sorted({*config, "exclude_modules"})))] = data.draw(values)
        text = json.dumps(config).encode()
    else:
        text = json.dumps(config).encode()
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.binary(max_size=2)) + text[at + 1 :]
    (directory / CONFIG).write_bytes(text)
    model = toy(seed=4)
    if loads(model, directory, unchanged):
        assert list(adapter_layers(model))


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '"LORA"', "{}", '{"peft_type": "LOHA"}', '{"peft_type": null}']
)
def test_not_a_lora_configuration(spoiled, refused, text):
    (spoiled / CONFIG).write_text(text)
    refused(spoiled, 'is not (a )?JSON|peft_type must be "LORA"')


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_bias": True}, "does not support: lora_bias=True"),
        ({"layer_replication": [[0, 1]]}, "does not support: layer_replication"),
        ({"use_qalora": True, "lora_bias": True}, "does not support: lora_bias=True, use_qalora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base's weights too"),
        ({"init_lora_weights": "olora_niter"}, "init_lora_weights='olora_niter' changed the base's weights too"),
        ({"a_setting_of_tomorrow": "x"}, "does not support: a_setting_of_tomorrow='x'"),
    ],
)
def test_settings_that_are_not_supported_are_named(spoiled, refused, fields, message):
    edit(spoiled, **fields)
    refused(spoiled, message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "3"),
        ("r", 3.0),
        ("r", True),
        ("lora_alpha", "7"),
        ("lora_alpha", [7]),
        ("lora_alpha", 10**400),
        ("lora_alpha", float("nan")),
        ("use_rslora", "false"),
        ("use_dora", "no"),
        ("fan_in_fan_out", []),
        ("ensure_weight_tying", {}),
        ("lora_alpha", float("inf")),
        ("r", 2**70),
        ("rank_pattern", {"embed": 2**70}),
        ("lora_dropout", "0"),
        ("target_modules", 5),
        ("target_modules", [1]),
        ("target_modules", "*proj"),  # no regular expression
        ("exclude_modules", True),
        ("exclude_modules", {"embed": 1}),
        ("modules_to_save", "head"),
        ("bias", "some"),
        ("bias", ["all"]),
        ("trainable_token_indices", [1.5]),
        ("trainable_token_indices", {"embed": 3}),
        ("rank_pattern", True),
        ("rank_pattern", ["embed"]),
        ("rank_pattern", {"embed": "3"}),
        ("rank_pattern", {"*": 3}),
        ("rank_pattern", {"(?i)embed": 3}),  # none behind a prefix
        ("layers_to_transform", "1"),
        ("layers_to_transform", [0.5]),
        ("layers_pattern", ["*"]),
        ("alpha_pattern", {"embed": None}),
    ],
)
def test_values_of_a_wrong_type_are_named(spoiled, refused, field, value):
    edit(spoiled, **{field: value})
    refused(spoiled, f"values of a wrong type or size: {field}=")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "(a+)+b"),
        ("exclude_modules", ".*.*.*.*.*.*x"),
        ("rank_pattern", {"(.|.)*x": 3}),
        ("alpha_pattern", {"x": 3, "(a|a)*x": 3}),
        ("layers_pattern", ["blocks", "(a*)*"]),
    ],
)
def test_patterns_that_could_take_for_ever_are_named(spoiled, refused, field, value):
    edit(spoiled, **{field: value})
    refused(spoiled, rf"{CONFIG}: {field}: the pattern .* might take very long to match")


def test_many_patterns_that_take_long_together_are_refused(spoiled, refused):
    edit(spoiled, alpha_pattern={f".*.*.*x{i}": 3 for i in range(100)})
    refused(spoiled, "its 100 patterns might take very long to match")


def test_a_pattern_of_layers_that_the_model_has_not_is_passed_over(spoiled, toy):
    """PEFT writes patterns as they were given, of whatever layers."""
    edit(spoiled, rank_pattern={"q_proj": 5, "em?bed": 3}, alpha_pattern={"vision.*": 2, "embed": 9})
    layers = dict(adapter_layers(phicore.load_adapter(toy(), spoiled)))
    assert {path: layer.alpha for path, layer in layers.items() if hasattr(layer, "alpha")}["embed"] == 9


def test_settings_that_say_nothing_are_passed_over(spoiled, toy):
    edit(spoiled, peft_version="99", megatron_core="megatron.core", init_lora_weights="eva", inference_mode=False)
    edit(
        spoiled,
        lora_bias=False,
        ensure_weight_tying=True,
        trainable_token_indices=None,
        layers_to_transform=[],
        a_setting_of_tomorrow=None,
    )
    phicore.load_adapter(toy(), spoiled)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(PREFIX, "model."): tensor for key, tensor in tensors.items()}


def test_a_wrong_prefix(spoiled, refused):
    edit_tensors(spoiled, renamed)
    refused(spoiled, "unexpected keys: model.blocks.0|missing keys: base_model.model.")


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        (PREFIX, PREFIX * 2, f'without "{PREFIX}" the unexpected'),
        (PREFIX, f"{PREFIX}_orig_mod.", 'without "_orig_mod." the unexpected'),
        (PREFIX, f"module.{PREFIX}", 'without "module." the unexpected'),
        (r"(blocks\.\d\.)", r"\1_fsdp_wrapped_module.", 'without "_fsdp_wrapped_module." the unexpected'),
        (r"blocks\.", "bloom.blocks.", 'without "bloom." the unexpected'),
        (r"lora_A\.", "lora_A.default.", 'without "default." the unexpected'),
        (PREFIX, "", f'with "{PREFIX}" put in the unexpected'),
        (r"blocks\.", "", 'with "blocks." put in the unexpected'),
    ],
)
def test_a_part_of_all_keys_that_is_too_much_or_lacks_is_named(spoiled, refused, here, there, message):
    edit_tensors(spoiled, lambda tensors: {re.sub(here, there, key): tensor for key, tensor in tensors.items()})
    refused(spoiled, f"{message} keys are the missing ones")


def test_keys_that_fit_no_layer_say_what_is_expected(spoiled, toy, unchanged):
    edit_tensors(spoiled, renamed)
    edit(spoiled, target_modules=["query"])
    model = toy()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"no key of the adapter names a layer of Toy.*model\.blocks"),
    ):
        phicore.load_adapter(model, spoiled)


def test_missing_unexpected_and_misshapen_keys_are_all_listed(spoiled, refused):
    up, head = f"{PREFIX}blocks.0.up_proj", f"{PREFIX}head"

    def change(tensors):
        del tensors[f"{up}.lora_A.weight"], tensors[f"{head}.bias"]
        tensors[f"{up}.lora_C.weight"] = torch.zeros(3)
        tensors[f"{up}.lora_B.weight"] = torch.zeros(33, 4, dtype=torch.float64)
        tensors[f"{PREFIX}embed.lora_magnitude_vector"] = torch.zeros(20, dtype=torch.int64)

    edit_tensors(spoiled, change)
    refused(spoiled, "which is unchanged: missing keys: [^;]*blocks.0.up_proj.lora_A.weight[^;]*head.bias")
    refused(spoiled, "unexpected keys: [^;]*blocks.0.up_proj.lora_C.weight")
    refused(spoiled, r"blocks.0.up_proj.lora_B.weight: \[33, 4\] in the file, \[33, 3\] in the model")
    refused(spoiled, r"dtypes that do not fit: [^;]*embed.lora_magnitude_vector: torch.int64 in the file")


def test_many_missing_keys_are_counted(spoiled, refused):
    edit_tensors(spoiled, lambda tensors: {k: v for k, v in tensors.items() if k.startswith(f"{PREFIX}embed")})
    refused(spoiled, r"missing keys: .* and \d+ more")


def test_layers_that_the_file_names_and_does_not_hold(spoiled, refused):
    """target_modules says down_proj, and there is no tensor for one of them: not the base weights in silence."""
    edit_tensors(spoiled, lambda t: {k: v for k, v in t.items() if "blocks.1.down_proj" not in k})
    refused(spoiled, "missing keys: .*blocks.1.down_proj.lora_A.weight")


def test_a_model_of_other_sizes(saved, toy, unchanged):
    model = toy(hidden=34)
    with unchanged(model), pytest.raises(ValueError, match=r"up_proj.lora_B.weight: \[33, 3\] in the file, \[34, 3\]"):
        phicore.load_adapter(model, saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "r of embed: 3 in the file, 2 here"),
        ({"alpha": 8}, "lora_alpha of embed: 7 in the file, 8 here"),
        ({"rslora": True}, "use_rslora of embed: False in the file, True here"),
        ({"dora": False}, "use_dora of embed: True in the file, False here"),
        ({"alpha_pattern": {"0.up_proj": 5}}, "differ: lora_alpha of blocks.0.up_proj: 7 in the file, 5 here$"),
        ({"rank_pattern": {"down_proj": 5}}, "differ: r of blocks.0.down_proj: 3 in the file, 5 here$"),
        ({"modules_to_save": []}, "unexpected keys: .*head.weight"),
        ({"target_modules": ["up_proj"]}, "unexpected keys: .*down_proj"),
    ],
)
def test_an_attached_adapter_that_differs_from_the_file(saved, toy, unchanged, options, message):
    config = phicore.LoRAConfig(**{"rank": 3, "alpha": 7, "dora": True, "modules_to_save": ["head"], **options})
    model = phicore.attach(toy(), config)
    with unchanged(model), pytest.raises(ValueError, match=message):
        phicore.load_adapter(model, saved)


def test_merged_models_neither_save_nor_load(tmp_path, saved, toy, unchanged):
    model = phicore.load_adapter(toy(), saved)
    phicore.merge(model)
    with unchanged(model):
        with pytest.raises(ValueError, match="are merged; unmerge it before loading"):
            phicore.load_adapter(model, saved)
        with pytest.raises(ValueError, match="is merged; unmerge it first"):
            phicore.save_adapter(model, tmp_path / "merged")
        with pytest.raises(ValueError, match='no adapter named "default"'):
            phicore.save_adapter(toy(), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"x": 1}', '{"a.qkv_proj": {"x": [1, 2]}}', '{"a.qkv_proj": {"q_proj": 4}}']
)
def test_metadata_that_is_not_right(spoiled, refused, text):
    data = (spoiled / WEIGHTS).read_bytes()
    (spoiled / WEIGHTS).write_bytes(with_metadata(data, "phicore.parts", text))
    refused(spoiled, r"its metadata phicore\.parts")


def test_an_adapter_without_values_is_not_written(toy, tmp_path):
    model = phicore.attach(toy().to("meta"), phicore.LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"\.lora_A\.weight is on meta, without values.*load the model whole"):
        phicore.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("kinds", "what"),
    [
        ({"up": LoRALinear, "down": DoRALinear}, "down of .* has DoRA and up has not"),
        ({"up": partial(LoRALinear, rslora=True), "down": LoRALinear}, "up of .* has rsLoRA and down has not"),
    ],
)
def test_unlike_layers_put_in_place_by_hand_are_not_one_adapter(tmp_path, kinds, what):
    """A file says it once for all of them: half of the model would be read as something else."""
    model = nn.ModuleDict({name: kind(nn.Linear(8, 8), rank=2) for name, kind in kinds.items()})
    with pytest.raises(ValueError, match=what):
        phicore.save_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())
    model.up.adapter_name = "other"
    for name in ("default", "other"):
        phicore.save_adapter(model, tmp_path / name, name)
        phicore.load_adapter(model, tmp_path / name, name)
