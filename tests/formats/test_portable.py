"""Adapters for other readers: each rule of each reader, its own arithmetic on what is exported, and PEFT on it."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import phicore
from phicore import atomic
from phicore.formats.peft import CONFIG, PREFIX, WEIGHTS
from phicore.formats.portable import check, export
from phicore.formats.readers import READERS

TARGETS = sorted(READERS)
EACH = pytest.mark.parametrize("target", TARGETS)
IDS = torch.arange(1, 13).view(2, 6)
Q, V, DOWN = "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"
SHAPES = {Q: (12, 20), V: (6, 20), DOWN: (20, 9)}  # kind of layer: out, in
RANKS = {Q: 8, V: 8, DOWN: 8}


def names(kind: str) -> list[str]:
    return [f"model.layers.{block}.{kind}" for block in (0, 1)]


def write(directory: Path, ranks=RANKS, dtype=torch.float64, tensors=None, drop=(), remove=(), **fields) -> Path:
    """An adapter of PEFT's format without a model: a rank for each kind of layer; more or fewer tensors and fields."""
    made = {}
    for kind, rank in ranks.items():
        for layer in names(kind):
            out, inner = SHAPES[kind]
            made[f"{PREFIX}{layer}.lora_A.weight"] = torch.randn(rank, inner).to(dtype)
            made[f"{PREFIX}{layer}.lora_B.weight"] = torch.randn(out, rank).to(dtype)
    most = max(ranks.values())
    config = {
        "peft_type": "LORA", "r": most, "lora_alpha": 12, "target_modules": [k.rsplit(".", 1)[-1] for k in ranks],
        "rank_pattern": {k: r for k, r in ranks.items() if r != most}, "bias": "none", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
    }  # fmt: skip
    made = {key: tensor for key, tensor in made.items() if not any(part in key for part in drop)}
    config = {key: value for key, value in config.items() if key not in remove}
    directory.mkdir(exist_ok=True)
    save_file(made | {PREFIX + key: t for key, t in (tensors or {}).items()}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config | fields))
    return directory


def config_of(directory: Path) -> dict:
    return json.loads((directory / CONFIG).read_text())


# ===== what each reader makes of two files: a change of the weight for each layer =====


def pattern(config: dict, kind: str, name: str) -> float:
    there = config[kind].items() if config.get(kind) else ()
    return next((value for key, value in there if re.match(rf"(.*\.)?({key})$", name)), None)


def peft_scaling(config: dict, name: str, A: Tensor) -> float:
    alpha, rank = pattern(config, "alpha_pattern", name), pattern(config, "rank_pattern", name)
    alpha, rank = config["lora_alpha"] if alpha is None else alpha, config["r"] if rank is None else rank
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def vllm_scaling(config: dict, name: str, A: Tensor) -> float:
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


def tgi_scaling(config: dict, name: str, A: Tensor) -> float:
    """The rank in the configuration is replaced by the padded one after the first kind of layer."""
    padded = 8 if config["r"] <= 8 else math.ceil(config["r"] / 16) * 16
    return vllm_scaling(config | ({} if name.endswith("q_proj") else {"r": padded}), name, A)


def llama_cpp_scaling(config: dict, name: str, A: Tensor) -> float:
    return config["lora_alpha"] / A.shape[0]


def kaito_scaling(config: dict, name: str, A: Tensor) -> float:
    """PEFT's scaling goes into A and B; the new adapter has rank = alpha = r, and use_rslora as it was."""
    return peft_scaling(config, name, A) * (math.sqrt(config["r"]) if config["use_rslora"] else 1)


SCALINGS = {
    "vllm": [vllm_scaling], "tgi": [tgi_scaling], "llama.cpp": [llama_cpp_scaling],
    "kaito": [kaito_scaling, vllm_scaling], "transformers": [peft_scaling],
}  # fmt: skip


def deltas(directory: Path, scaling) -> dict[str, Tensor]:
    """scaling * B A of each layer, in float64."""
    config, tensors = {"use_rslora": False} | config_of(directory), load_file(directory / WEIGHTS)
    ends = ".lora_A.weight"
    found = {}
    for key in sorted(k for k in tensors if k.endswith(ends)):
        A, B = tensors[key].double(), tensors[key.removesuffix(ends) + ".lora_B.weight"].double()
        name = key.removeprefix(PREFIX).removesuffix(ends)
        found[name] = scaling(config, name, A) * (B @ A)
    return found


ALPHAS = st.sampled_from((1, 3, 8, 12, 32, 7.5))


@given(
    target=st.sampled_from(TARGETS),
    ranks=st.tuples(*[st.sampled_from((1, 2, 3, 4, 8, 12, 16))] * 3),
    alpha=ALPHAS,
    alphas=st.dictionaries(st.sampled_from(("q_proj", r"layers\.1\..*down_proj", "0.self_attn.v_proj")), ALPHAS),
    rslora=st.booleans(),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    as_expression=st.booleans(),
)
def test_a_readers_own_arithmetic_gives_the_adapters_deltas(
    target, ranks, alpha, alphas, rslora, dtype, as_expression, relative_error
):
    with tempfile.TemporaryDirectory() as place:
        fields = {"lora_alpha": alpha, "alpha_pattern": alphas, "use_rslora": rslora}
        if as_expression:
            fields |= {"target_modules": r".*_proj", "exclude_modules": ["o_proj"]}
        source = write(Path(place) / "source", dict(zip(SHAPES, ranks, strict=True)), dtype, **fields)
        output = Path(place) / "output"
        changed = export(source, output, target)
        assert check(output, target) == []
        assert (check(source, target) == []) == (changed == [])
        exact = deltas(source, peft_scaling)
        bound = 1e-13 if dtype == torch.float64 else 1e-7  # a B that is multiplied is rounded once
        for scaling in [*SCALINGS[target], peft_scaling]:  # whatever the reader, PEFT reads it too
            given = deltas(output, scaling)
            assert given.keys() == exact.keys()
            for name, delta in exact.items():
                assert relative_error(given[name], delta) < bound, (name, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["vllm", "tgi", "llama.cpp", "kaito"])
def test_powers_of_two_keep_the_dtype_and_every_bit(tmp_path, target, dtype):
    source = write(tmp_path / "source", {Q: 16, V: 4, DOWN: 2}, dtype, alpha_pattern={"v_proj": 3})
    export(source, tmp_path / "output", target)
    given, exact = deltas(tmp_path / "output", SCALINGS[target][0]), deltas(source, peft_scaling)
    assert all(torch.equal(given[name], delta) for name, delta in exact.items())
    assert {t.dtype for t in load_file(tmp_path / "output" / WEIGHTS).values()} == {dtype}


def test_a_ratio_that_16_bits_do_not_hold_makes_b_float32_and_only_that(tmp_path):
    source = write(tmp_path / "source", dtype=torch.bfloat16, alpha_pattern={"0.self_attn.v_proj": 18})
    export(source, tmp_path / "output", "vllm")
    given, exact = deltas(tmp_path / "output", vllm_scaling), deltas(source, peft_scaling)
    assert all(torch.equal(given[name], delta) for name, delta in exact.items())  # 3/2 of 8 bits fits into 24
    wide = {k for k, t in load_file(tmp_path / "output" / WEIGHTS).items() if t.dtype == torch.float32}
    assert wide == {f"{PREFIX}model.layers.0.{V}.lora_B.weight"}


def test_a_product_that_overflows_its_dtype_is_widened(tmp_path):
    source = write(tmp_path / "source", dtype=torch.float16, alpha_pattern={"0.self_attn.v_proj": 12 * 2**16})
    export(source, tmp_path / "output", "llama.cpp")
    given, exact = deltas(tmp_path / "output", llama_cpp_scaling), deltas(source, peft_scaling)
    assert all(torch.equal(given[name], delta) for name, delta in exact.items())


@EACH
@pytest.mark.parametrize("rank", [8, 16])
def test_baking_changes_alpha_and_no_tensor(tmp_path, target, rank):
    source = write(tmp_path / "source", dict.fromkeys(SHAPES, rank), use_rslora=True)
    export(source, tmp_path / "output", target)
    before, after = config_of(source), config_of(tmp_path / "output")
    honoured = target in ("vllm", "tgi", "transformers")
    assert after["use_rslora"] == honoured
    assert after["lora_alpha"] == pytest.approx(12 if honoured else 12 * math.sqrt(rank), rel=1e-15)
    assert isinstance(after["lora_alpha"], int) == (honoured or rank == 16)  # PEFT declares it an int
    assert after["r"] == before["r"]
    assert load_file(source / WEIGHTS).keys() == load_file(tmp_path / "output" / WEIGHTS).keys()
    for key, tensor in load_file(tmp_path / "output" / WEIGHTS).items():
        assert torch.equal(tensor, load_file(source / WEIGHTS)[key])


# ===== the rules =====

ZERO = torch.zeros
MAGNITUDES = {f"{name}.lora_magnitude_vector": torch.ones(SHAPES[kind][0]) for kind in SHAPES for name in names(kind)}
TABLE = {"model.embed_tokens.base_layer.weight": ZERO(5, 20)}
EMBEDDING = {"model.embed_tokens.lora_embedding_A": ZERO(8, 5), "model.embed_tokens.lora_embedding_B": ZERO(20, 8)}
HEAD = {"lm_head.weight": ZERO(5, 20)}
SCORE = {"score.weight": ZERO(3, 20)}
DEEP_SCORE = {"score.dense.weight": ZERO(20, 20), "score.out_proj.weight": ZERO(3, 20)}
LM_HEAD = {f"lm_head.lora_{AB}.weight": ZERO(8, 8) for AB in "AB"}
STARCODER = {
    f"model.layers.{i}.mlp.c_{c}.lora_{AB}.weight": ZERO(8, 8) for i in (0, 1) for c in ("fc", "proj") for AB in "AB"
}
TOKENS = {"model.embed_tokens.token_adapter.trainable_tokens_delta": ZERO(2, 20)}
CONVOLUTION = {"conv.lora_A.weight": ZERO(8, 3, 2, 2), "conv.lora_B.weight": ZERO(4, 8, 1, 1)}
ATTENTION = {"attn.lora_A": ZERO(8, 4), "attn.lora_B": ZERO(12, 8)}
ATTENTION_TOO = {  # as PEFT 0.21 names the same
    f"attn.{place}lora_{AB}.weight": ZERO(8, 8) for place in ("", "base_layer.out_proj.") for AB in "AB"
}
FUSED = {f"model.layers.{i}.mlp.gate_up_proj.lora_{AB}": ZERO(8, 8) for i in (0, 1) for AB in ("A.weight", "B.weight")}
QKV = {f"model.layers.{i}.self_attn.qkv_proj.lora_{AB}": ZERO(8, 8) for i in (0, 1) for AB in ("A.weight", "B.weight")}
BIAS = {f"{name}.lora_B.bias": ZERO(12) for name in names(Q)}
ALL_BIASES = {f"{name}.base_layer.bias": ZERO(12) for name in names(Q)}

ALL_BUT_PEFT = ["vllm", "tgi", "llama.cpp", "kaito"]
# what the adapter is; what is said of it; which targets refuse it; which need it changed
RULES = {
    "plain": ({}, "", [], []),
    "DoRA": ({"use_dora": True, "tensors": MAGNITUDES}, "use_dora=True", ALL_BUT_PEFT, []),
    "magnitudes": ({"tensors": MAGNITUDES}, "lora_magnitude_vector", ALL_BUT_PEFT, []),
    "rsLoRA": ({"use_rslora": True}, "use_rslora=True", [], ["llama.cpp", "kaito"]),
    "rank_pattern": ({"ranks": {Q: 8, V: 4}}, "ranks 4, 8", [], ["vllm", "tgi", "kaito"]),
    "another r": ({"r": 16, "rank_pattern": {".*": 8}}, "ranks 8", [], ["vllm", "tgi", "kaito"]),
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 3}}, "alphas 3, 12", [], ALL_BUT_PEFT),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"], "tensors": HEAD}, "modules_to_save=", ALL_BUT_PEFT, []
    ),
    "score": (
        {"modules_to_save": ["classifier", "score"], "tensors": SCORE}, "modules_to_save=",
        ["tgi", "llama.cpp", "kaito"], [],
    ),
    "deep score": ({"modules_to_save": ["score"], "tensors": DEEP_SCORE}, "modules_to_save=", ALL_BUT_PEFT, []),
    "plain tensors": ({"tensors": HEAD}, "lm_head.weight", ALL_BUT_PEFT, []),
    "bias": ({"bias": "lora_only", "tensors": ALL_BIASES}, "bias='lora_only'", ALL_BUT_PEFT, []),
    "tokens": (
        {"trainable_token_indices": [1, 2], "tensors": TOKENS}, "trainable_tokens_delta", ALL_BUT_PEFT, []
    ),
    "lora_bias": (
        {"lora_bias": True, "tensors": BIAS}, r"lora_bias=True: .* with peft \(merge_and_unload\)", ALL_BUT_PEFT, []
    ),
    "rank 32": ({"ranks": {Q: 32}}, "rank 32: it takes at most 16 unless", ["vllm", "kaito"], []),
    "rank 16": ({"ranks": {Q: 16}}, "", [], []),
    "rank 12": ({"ranks": {Q: 12}}, "rank 12: it pads ranks", [], ["tgi"]),
    "rank 2": ({"ranks": {Q: 2}}, "rank 2: it pads ranks", [], ["tgi"]),
    "no r": ({"remove": ["r"]}, "no r in adapter_config.json: it requires them", [], ["vllm", "kaito"]),
    "no alpha": ({"remove": ["lora_alpha"]}, "no lora_alpha in", [], ["vllm", "llama.cpp", "kaito"]),
    "no targets": ({"remove": ["target_modules"]}, "no target_modules in", [], ["vllm", "kaito"]),
    "gate_up_proj": ({"tensors": FUSED}, "gate_up_proj, .*it has no such layers", ["tgi"], []),
    "lm_head": ({"tensors": LM_HEAD}, "lm_head: it has no such layers", ["tgi"], []),
    "layers of Starcoder2": ({"tensors": STARCODER}, "", [], []),
    "qkv_proj": ({"tensors": QKV}, "", [], []),
    "embedding": ({"tensors": EMBEDDING}, "embed_tokens", ["tgi"], []),
    "table": (
        {"tensors": EMBEDDING | TABLE}, "base_layer.weight: .*; export leaves it out|lora_embedding_A: it leaves",
        ["tgi"], ["vllm", "llama.cpp", "kaito"],
    ),
    "some blocks": ({"drop": [f"0.{V}"]}, rf"model.layers.\*.{V}: it drops a kind of layer", ["tgi"], []),
    "the first blocks": ({"layers_to_transform": [0, 1]}, rf"layers.\*.{Q}.*: it drops a kind of layer", ["tgi"], []),
    "convolution": ({"tensors": CONVOLUTION}, "conv.lora_A", ALL_BUT_PEFT, []),
    "attention": ({"tensors": ATTENTION}, "attn.lora_A", ALL_BUT_PEFT, []),
    "attention of today": ({"tensors": ATTENTION_TOO}, "attn.base_layer.out_proj.lora_A", ALL_BUT_PEFT, []),
    "parameters": ({"target_parameters": ["x.y"]}, r"target_parameters=\['x.y'\]: it takes", ALL_BUT_PEFT, []),
    "Conv1D": ({"fan_in_fan_out": True}, "fan_in_fan_out=True", ALL_BUT_PEFT, []),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'", ALL_BUT_PEFT, []),
    "a start that leaves the base": ({"init_lora_weights": "gaussian"}, "", [], []),
    "fields of a later peft": (
        {"peft_version": "0.21.2", "corda_config": None}, "fields corda_config, peft_version: its peft is older",
        [], ["kaito"],
    ),
    "unknown setting": ({"use_qalora": True}, "use_qalora=True: it does not know", ALL_BUT_PEFT, []),
}  # fmt: skip


@EACH
@pytest.mark.parametrize("rule", RULES)
def test_each_rule(tmp_path, rule, target):
    options, message, refusing, changing = RULES[rule]
    source = write(tmp_path / "source", **options)
    output = tmp_path / "output"
    said = "\n".join(map(str, check(source, target)))
    if target in refusing:
        assert re.search(message, said), said
        with pytest.raises(ValueError, match=f"cannot be written for {re.escape(target)}.*{message}"):
            export(source, output, target)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
        return
    changed = export(source, output, target)
    assert list(map(str, changed)) == said.splitlines()
    assert all(finding.mended for finding in changed)
    if target in changing:
        assert re.search(message, said), said
    else:
        assert changed == []
        before, after = load_file(source / WEIGHTS), load_file(output / WEIGHTS)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert check(output, target) == []
    assert sorted(p.name for p in output.iterdir()) == [CONFIG, WEIGHTS]


def test_everything_that_is_refused_is_named_at_once(tmp_path):
    options = {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "all", "use_rslora": True}
    source = write(tmp_path / "source", {Q: 32}, **options)
    with pytest.raises(ValueError, match="cannot be written for vllm") as told:
        export(source, tmp_path / "output", "vllm")
    for part in ("use_dora=True", "modules_to_save=['lm_head']", "bias='all'", "rank 32", "--merge --model DIR"):
        assert part in str(told.value)
    assert "rslora" not in str(told.value)


@pytest.mark.parametrize(
    ("target", "max_rank", "message"),
    [
        ("vllm", 48, "max_rank=48: vllm can be set to 1, 8, 16, 32, 64, 128, 256, 320, 512"),
        ("tgi", 64, "max_rank=64: tgi can be set to none, since it takes any rank"),
        ("gguf", None, 'no target "gguf"; there are: vllm, tgi, llama.cpp, kaito, transformers'),
    ],
)
def test_settings_that_a_target_has_not(tmp_path, target, max_rank, message):
    with pytest.raises(ValueError, match=message):
        check(write(tmp_path / "source"), target, max_rank=max_rank)


def test_a_server_may_be_set_to_a_higher_or_lower_rank(tmp_path):
    source = write(tmp_path / "source", {Q: 32})
    assert check(source, "vllm", max_rank=32) == []
    assert export(source, tmp_path / "output", "vllm", max_rank=64) == []
    assert "rank 32: it takes at most 8" in str(check(source, "vllm", max_rank=8)[0])


def test_targets_of_the_export(tmp_path):
    def targets(target: str, **fields) -> list[str] | str:
        source = write(tmp_path / "source", **fields)
        export(source, tmp_path / "output", target, overwrite=True)
        return config_of(tmp_path / "output")["target_modules"]

    every = sorted(name for kind in SHAPES for name in names(kind))
    assert targets("vllm", target_modules=["v_proj", "q_proj", "down_proj", "k_proj"]) == [
        "down_proj",
        "q_proj",
        "v_proj",
    ]
    assert targets("vllm", target_modules="all-linear") == every
    assert targets("vllm", exclude_modules=["2.q_proj"]) == every
    assert targets("vllm", layers_to_transform=[0, 1], layers_pattern="layers") == every
    assert targets("vllm", drop=["layers.1."], layers_to_transform=0) == every[: len(every) // 2]
    assert targets("transformers", target_modules=r".*_proj", exclude_modules=["2.q_proj"]) == r".*_proj"
    assert config_of(tmp_path / "output")["exclude_modules"] == ["2.q_proj"]


def test_fields_are_few_and_the_order_of_a_pattern_is_kept(tmp_path):
    patterns = {"rank_pattern": {"v_proj": 4, ".*": 8}, "alpha_pattern": {"v_proj": 3, ".*_proj": 5}}
    source = write(tmp_path / "source", {Q: 8, V: 4}, r=16, **patterns, init_lora_weights=True, lora_dropout=0.1)
    export(source, tmp_path / "output", "transformers")
    config = config_of(tmp_path / "output")
    assert list(config) == sorted(config)
    assert "peft_version" not in config
    assert "init_lora_weights" not in config
    assert list(config["rank_pattern"]) == ["v_proj", ".*"]
    assert (config["lora_dropout"], config["base_model_name_or_path"]) == (0.1, "some/model")
    assert all(config[key] == value for key, value in patterns.items())
    assert config.keys() <= peft.LoraConfig().to_dict().keys()


def test_the_number_of_the_first_layer_is_kept(tmp_path, tiny):
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=0, init_lora_weights=False)
    peft.get_peft_model(tiny("llama"), config, autocast_adapter_dtype=False).save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "output", "transformers")
    assert config_of(tmp_path / "output")["layers_to_transform"] == 0
    source, output = (load(tiny("llama"), tmp_path / which) for which in ("source", "output"))
    assert torch.equal(logits(output), logits(source))


# ===== files =====


def test_two_processes_write_the_same_bytes(tmp_path):
    source = write(tmp_path / "source", {Q: 8, V: 4, DOWN: 2}, use_rslora=True, target_modules=r".*_proj")
    code = "import sys; from phicore.formats.portable import export; export(*sys.argv[1:])"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(source), str(tmp_path / seed), "kaito"]
        subprocess.run(command, env=env, check=True)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    header = (tmp_path / "1" / WEIGHTS).read_bytes()
    assert b'"__metadata__":{"format":"pt"}' in header[: 8 + int.from_bytes(header[:8], "little")]


@pytest.mark.parametrize("failing", ["write_bytes", "write_text"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, failing):
    source = write(tmp_path / "source")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(atomic, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        export(source, tmp_path / "output", "vllm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_what_is_there_is_replaced_only_on_request_and_never_the_adapter_itself(tmp_path):
    source, output = write(tmp_path / "source", use_rslora=True), tmp_path / "output"
    output.mkdir()
    (output / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        export(source, output, "llama.cpp")
    assert [p.name for p in output.iterdir()] == ["mine"]
    export(source, output, "llama.cpp", overwrite=True)
    assert sorted(p.name for p in output.iterdir()) == [CONFIG, WEIGHTS]
    with pytest.raises(ValueError, match="would be replaced with all that is in it"):
        export(source, tmp_path / "output" / ".." / "source", "llama.cpp", overwrite=True)
    assert config_of(source)["use_rslora"]


Q0 = f"model.layers.0.{Q}.lora_"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": [f"0.{Q}.lora_B"]}, f"no whole adapter: .*{Q0}A.weight is there and .*{Q0}B.weight is not"),
        ({"drop": [f"0.{Q}.lora_A"]}, f"no whole adapter: .*{Q0}B.weight is there and .*{Q0}A.weight is not"),
        ({"drop": ["lora_"]}, "no A and no B in it"),
        ({"tensors": {Q0 + "A.weight": ZERO(4, 20)}}, r"\[4, 20\] and \[12, 8\], and adapter_config.json says rank 8"),
        ({"r": 4}, r"\[8, 20\] and \[12, 8\], and adapter_config.json says rank 4"),
        ({"tensors": {Q0 + "B.weight": ZERO(12, 4)}}, r"\[8, 20\] and \[12, 4\]"),
        ({"tensors": {Q0 + "A.weight": ZERO(8)}}, r"are torch.float32 \[8\] and"),
        ({"tensors": {Q0 + "A.weight": ZERO(8, 20, dtype=torch.int8)}}, "are torch.int8"),
        ({"tensors": {Q0 + "A.weight": ZERO(8, 20) / 0}}, f"holds NaN or infinity, in {PREFIX}{Q0}A.weight"),
        ({"lora_alpha": 0}, "has rank 8 and lora_alpha 0; both must be above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan"),
        ({"peft_type": "IA3"}, 'peft_type must be "LORA"'),
        ({"rank_pattern": {"q_proj": "4"}}, "values of a wrong type or size: rank_pattern"),
    ],
)
def test_what_is_no_adapter_is_told(tmp_path, options, message):
    source = write(tmp_path / "source", **options)
    for act in (lambda: check(source, "vllm"), lambda: export(source, tmp_path / "output", "transformers")):
        with pytest.raises(ValueError, match=message):
            act()
    assert not (tmp_path / "output").exists()


def test_files_that_are_missing_pickled_damaged_or_of_another_prefix(tmp_path):
    source = write(tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    save_file({key.replace(PREFIX, "model."): t for key, t in tensors.items()}, source / WEIGHTS)
    with pytest.raises(ValueError, match=r"does not start with 'base_model\.model\.'.* and 2 more"):
        check(source, "vllm")
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        check(source, "vllm")
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"saved by pickle \(.bin, .pt\) are not read"):
        check(source, "tgi")


# ===== PEFT itself =====

LLAMA = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 8}, "alpha_pattern": {"0.self_attn.v_proj": 3}}


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(model: nn.Module, directory: Path):
    return peft.PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False).eval()


@pytest.fixture(scope="module")
def adapted(tiny, randomize, tmp_path_factory):
    """Directories of adapters of a tiny Llama, and the logits that each gives."""
    made = {}
    for name, options in {
        "rslora": {"rslora": True},
        "patterns": {"rslora": True, **PATTERNS},
        "dora": {"dora": True},
        "head": {"modules_to_save": ["lm_head"]},
        "tokens": {"trainable_token_indices": [7, 3]},
    }.items():
        config = phicore.LoRAConfig(rank=4, alpha=7, target_modules=LLAMA, **options)
        model = randomize(phicore.attach(tiny("llama"), config))
        directory = tmp_path_factory.mktemp(name)
        phicore.save_adapter(model, directory)
        made[name] = directory, logits(model)
    return made


@EACH
@pytest.mark.parametrize("kind", ["rslora", "patterns"])
def test_peft_and_phicore_read_what_is_exported(tmp_path, tiny, adapted, target, kind):
    directory, expected = adapted[kind]
    export(directory, tmp_path / "output", target)
    torch.testing.assert_close(logits(load(tiny("llama"), tmp_path / "output")), expected, rtol=1e-9, atol=1e-9)
    ours = phicore.load_adapter(tiny("llama"), tmp_path / "output")
    torch.testing.assert_close(logits(ours), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dora", "head", "tokens"])
def test_transformers_gets_all_that_peft_reads(tmp_path, tiny, adapted, kind):
    directory, expected = adapted[kind]
    assert export(directory, tmp_path / "output", "transformers") == []
    torch.testing.assert_close(logits(load(tiny("llama"), tmp_path / "output")), expected, rtol=1e-9, atol=1e-9)


def recombined(model: nn.Module, directory: Path) -> Tensor:
    """What KAITO's transformers runtime does with a mounted adapter, and the logits that come out."""
    model = peft.PeftModel.from_pretrained(model, directory, "one", autocast_adapter_dtype=False)
    model.add_weighted_adapter(["one"], [1.0], "combined_adapter", combination_type="svd")
    model.set_adapter("combined_adapter")
    model.delete_adapter("one")
    return logits(model.eval())


@pytest.mark.parametrize("kind", ["rslora", "patterns", "dora", "head"])
def test_kaitos_recombination_goes_wrong_before_the_export_and_right_after(tmp_path, tiny, adapted, kind):
    directory, expected = adapted[kind]
    assert not torch.allclose(recombined(tiny("llama"), directory), expected, rtol=1e-2, atol=1e-2)
    if kind in ("dora", "head"):
        with pytest.raises(ValueError, match="cannot be written for kaito"):
            export(directory, tmp_path / "output", "kaito")
        return
    export(directory, tmp_path / "output", "kaito")
    given = recombined(tiny("llama"), tmp_path / "output")  # PEFT multiplies by square roots in float32
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
