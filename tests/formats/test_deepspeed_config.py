"""DeepSpeed's JSON: what is taken of it, against DeepSpeed's own reading, and what is refused."""

import json
import os
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import phicore
from phicore import TrainConfig
from phicore.formats.deepspeed_config import NO_EFFECT, TURNED_OFF, ZERO_NO_EFFECT, read_config
from phicore.training.schedule import learning_rate

os.environ.setdefault("DS_ACCELERATOR", "cpu")
FULL: dict[str, Any] = {
    "train_batch_size": 48,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.5,
    "steps_per_print": 10,
    "zero_allow_untested_optimizer": True,
    "wandb": {"enabled": False, "team": "t"},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-8, "weight_decay": 0.01}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 20, "total_num_steps": 200, "warmup_type": "linear", "cos_min_ratio": 0.1},
    },
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": 5e6,
        "overlap_comm": True,
        "offload_optimizer": {"device": "none"},
        "stage3_max_live_parameters": 1e9,
    },
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
}


def test_a_whole_file(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(FULL))
    found = read_config(path, world_size=4)
    expected = {"batch_size": 48, "accumulation": 3, "max_norm": 0.5, "learning_rate": 3e-4, "beta1": 0.8}
    expected |= {"beta2": 0.95, "weight_decay": 0.01, "steps": 200, "warmup_steps": 20, "zero_stage": 2}
    assert {name: getattr(found.train, name) for name in expected} == expected
    assert found.train.min_learning_rate == pytest.approx(3e-5)
    assert found.dtype == torch.bfloat16
    assert found.scaler is None
    notes = " ".join(found.notes)
    for said in ("overlap_comm", "steps_per_print", "stage3_max_live_parameters", "WarmupCosineLR"):
        assert said in notes
    assert found.optimizer == {
        "stage": 2,
        "bucket_bytes": 10_000_000,
        "lr": 3e-4,
        "betas": (0.8, 0.95),
        "weight_decay": 0.01,
    }
    phicore.ZeroOptimizer(torch.nn.Linear(2, 2).named_parameters(), torch.optim.AdamW, **found.optimizer)
    assert json.loads(path.read_text()) == FULL


AUTOS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_type": "linear", **dict.fromkeys(("warmup_num_steps", "total_num_steps"), "auto")}
        | {"cos_min_ratio": "auto"},
    },
    "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": "auto"},
}


@pytest.mark.parametrize("content", [{}, AUTOS])
def test_what_is_left_open_stays(content):
    given = TrainConfig(steps=7, batch_size=12, accumulation=2, learning_rate=0.5, weight_decay=0.3, zero_stage=1)
    found = read_config(content, given, world_size=2)
    assert found.train == given
    assert found.dtype is None
    assert found.optimizer["lr"] == 0.5
    assert "bucket_bytes" not in found.optimizer


maybe = st.one_of(st.none(), st.integers(1, 6))


@given(micro=maybe, passes=maybe, factor=maybe, world_size=st.integers(1, 4), off=st.sampled_from([0, 0, 0, 1]))
def test_batches_are_as_deepspeed_has_them(micro, passes, factor, world_size, off):
    from deepspeed.runtime.config import DeepSpeedConfig

    total = None if factor is None else factor * (micro or 1) * world_size + off
    content = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
    }
    content = {key: value for key, value in content.items() if value is not None}
    theirs = DeepSpeedConfig.__new__(DeepSpeedConfig)
    theirs.world_size = world_size
    theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu = total, micro
    theirs.gradient_accumulation_steps = passes
    if micro is None and total is None:
        return  # DeepSpeed wants one of them; here they may come from TrainConfig
    try:
        theirs._configure_train_batch_size()
    except AssertionError:
        with pytest.raises(ValueError, match="train_batch_size"):
            read_config(content, world_size=world_size)
        return
    found = read_config(content, world_size=world_size).train
    assert (found.batch_size, found.accumulation) == (theirs.train_batch_size, theirs.gradient_accumulation_steps)


@given(
    kind=st.sampled_from(["WarmupLR", "WarmupCosineLR"]),
    warmup=st.integers(2, 30),
    more=st.integers(5, 60),
    ratio=st.floats(0, 0.9),
)
def test_rates_are_near_those_of_deepspeed(kind, warmup, more, ratio):
    from deepspeed.runtime import lr_schedules

    params: dict[str, Any] = {"warmup_num_steps": warmup, "warmup_type": "linear"}
    if kind == "WarmupCosineLR":
        params |= {"total_num_steps": warmup + more, "cos_min_ratio": ratio}
    content = {"optimizer": {"type": "Adam", "params": {"lr": 0.5}}, "scheduler": {"type": kind, "params": params}}
    config = read_config(content, TrainConfig(steps=warmup + more)).train
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = getattr(lr_schedules, kind)(optimizer, **params)
    bound = 0.5 * max(2 / warmup, 2 / more) + 1e-9
    rates = []
    for step in range(config.steps):
        rates.append((learning_rate(step, config), optimizer.param_groups[0]["lr"]))
        scheduler.step()
    assert max(abs(ours - theirs) for ours, theirs in rates) <= bound
    assert rates[-1][0] == pytest.approx(rates[-1][1], abs=bound)


def changed(path: str, value: Any) -> dict[str, Any]:
    content = json.loads(json.dumps(FULL))
    *parents, key = path.split(".")
    place = content
    for parent in parents:
        place = place.setdefault(parent, {})
    place[key] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("zero_optimization.stage", 3, "accepted: 0, 1 and 2"),
        ("zero_optimization.stage", True, "accepted: 0, 1 and 2"),
        ("zero_optimization.offload_optimizer", {"device": "cpu"}, 'got "cpu"; accepted: "none"'),
        ("zero_optimization.offload_param", {"device": "nvme"}, 'got "nvme"; accepted: "none"'),
        ("zero_optimization.stgae", 2, '"zero_optimization.stgae" is no key .* stage'),
        ("zero_optimization.reduce_bucket_size", 0.5, "accepted: an integer"),
        ("zero_optimization", 2, "accepted: an object"),
        ("train_batch_sise", 2, '"train_batch_sise" is no key .*accepted: .*train_batch_size'),
        ("train_batch_size", 50, "50 is not a train_micro_batch_size_per_gpu of 4 times 3 .* times 4 ranks"),
        ("train_batch_size", True, "accepted: an integer"),
        ("gradient_clipping", -1, "at least 0"),
        ("gradient_clipping", float("nan"), "at least 0"),
        ("gradient_clipping", 10**400, "at least 0"),
        ("prescale_gradients", True, "got true; accepted: false"),
        ("communication_data_type", "fp16", 'got "fp16"; accepted: null'),
        ("optimizer.type", "Lamb", "accepted: AdamW, Adam"),
        ("optimizer.params.betas", [0.9], "two numbers"),
        ("optimizer.params.eps", 1e-6, "accepted: 1e-08"),
        ("optimizer.params.momentum", 0.9, '"optimizer.params.momentum" is no key .* in optimizer.params: .*betas'),
        ("optimizer.params.lr", "fast", "accepted: a number"),
        ("scheduler.type", "WarmupDecayLR", "accepted: WarmupLR and WarmupCosineLR"),
        ("scheduler.params.warmup_type", "log", "accepted: linear"),
        ("scheduler.params.warmup_min_ratio", 0.5, "accepted: 0"),
        ("scheduler.params.warmup_min_lr", 0.5, "is no key"),
        ("bf16.bf16_optimizer_states", True, "accepted: false"),
        ("bf16.on", True, '"bf16.on" is no key'),
        ("fp16.enabled", True, "exclude each other"),
        ("fp16.enabled", 1, "accepted: true, false"),
        ("wandb.enabled", True, "there is no wandb here"),
        ("sparse_attention", {"mode": "dense"}, '"sparse_attention" is no key'),
    ],
)
def test_what_is_not_here_is_refused_by_name(path, value, said):
    with pytest.raises(ValueError, match=said) as raised:
        read_config(changed(path, value), world_size=4)
    assert path.split(".")[-1].split("_batch")[0] in str(raised.value)


def test_values_that_contradict_each_other():
    lr = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}
    with pytest.raises(ValueError, match=r"optimizer\.params\.lr makes learning_rate 0.0003, but it is 0.1 already"):
        read_config(lr, TrainConfig(learning_rate=0.1))
    assert read_config(lr, TrainConfig(learning_rate=3e-4)).train.learning_rate == 3e-4
    warmup = {"warmup_max_lr": 1e-3, "warmup_type": "linear"}
    with pytest.raises(ValueError, match=r"scheduler\.params\.warmup_max_lr makes learning_rate 0.001, but"):
        read_config(lr | {"scheduler": {"type": "WarmupLR", "params": warmup}})
    with pytest.raises(ValueError, match=r"warmup_type: got log, DeepSpeed's default"):
        read_config({"scheduler": {"type": "WarmupLR"}})
    with pytest.raises(ValueError, match="accumulation"):
        read_config({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}, TrainConfig(accumulation=2))
    with pytest.raises(ValueError, match=r"scheduler\.params\.warmup_num_steps is given, but"):
        read_config({"scheduler": {"params": {"warmup_num_steps": 3}}})


def test_values_that_no_trainer_takes_name_the_file(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"optimizer": {"type": "AdamW", "params": {"lr": 0}}}')
    with pytest.raises(ValueError, match=r"ds\.json: learning_rate must be above 0"):
        read_config(file)


def test_decay_that_is_not_decoupled():
    params = {"lr": 0.1, "weight_decay": 0.1, "adam_w_mode": False}
    with pytest.raises(ValueError, match="added to the gradient"):
        read_config({"optimizer": {"type": "Adam", "params": params}})
    # DeepSpeed's own rules: no decay is no difference, and AdamW means decoupled whatever adam_w_mode says
    read_config({"optimizer": {"type": "Adam", "params": params | {"weight_decay": 0.0}}})
    read_config({"optimizer": {"type": "AdamW", "params": params}})


def test_float16_and_other_forms():
    found = read_config({"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale": 0, "hysteresis": 2}})
    assert (found.dtype, found.scaler) == (torch.float16, {"init_scale": 4096.0, "growth_interval": 1000})
    assert "fp16.hysteresis" in found.notes[0]
    with pytest.raises(ValueError, match=r"fp16\.loss_scale: got 128; accepted: 0"):
        read_config({"fp16": {"enabled": True, "loss_scale": 128}})
    assert read_config({"bfloat16": {"enabled": True}}).dtype == torch.bfloat16
    stage0 = read_config({"zero_optimization": {"stage": 0, "reduce_bucket_size": 100}})
    assert stage0.optimizer["stage"] == stage0.train.zero_stage == 1
    assert stage0.optimizer["bucket_bytes"] == 400
    assert "stage 0" in stage0.notes[0]


def test_every_listed_key_is_accepted():
    content = dict.fromkeys(NO_EFFECT, 1) | {key: {"enabled": False} for key in TURNED_OFF}
    found = read_config(content | {"zero_optimization": dict.fromkeys(ZERO_NO_EFFECT, 1)})
    assert all(key in found.notes[0] for key in (*NO_EFFECT, *ZERO_NO_EFFECT))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"bf16": {}, "bf16": {}}', "\xff"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_config(path)
