"""DeepSpeed's checkpoints: what the real DeepSpeed saved on two ranks goes on here as it went on there."""

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import phicore
from phicore.formats.deepspeed import DeepSpeedCheckpoint, read_checkpoint
from phicore.formats.deepspeed_weights import in_dtype, trained_tensors, write_weights
from phicore.training.adopt import adopt
from phicore.training.consolidate import consolidate
from tests.formats.deepspeed_runs import RUNS, WORLD_SIZE, Net, batch, groups, loss_of
from tests.spoilt import VALUES

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for accelerators and warns
FLOAT32 = ["stage 1", "stage 2", "round robin", "aligned"]


@pytest.fixture
def runs(deepspeed_runs: Path) -> Path:
    """A directory for each of deepspeed_runs.RUNS."""
    return deepspeed_runs


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a run, to be spoilt."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(runs / name / "three", tmp_path / "three"))

    return make


def facts_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "facts.pt", weights_only=True)


def restored(run: Path, make: Callable[..., torch.optim.Optimizer]) -> tuple[Net, torch.optim.Optimizer]:
    found = read_checkpoint(run)
    model = Net().to(found.model["first.weight"].dtype)
    model.load_state_dict(found.model)
    one_group = len(found.optimizer["param_groups"]) == 1
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = make(named if one_group else groups(model))
    optimizer.load_state_dict(found.optimizer)
    return model, optimizer


def sharded(params: Any) -> torch.optim.Optimizer:
    return phicore.ZeroOptimizer(params, torch.optim.AdamW, lr=9.0)  # the rate comes with the state


def plain(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=9.0)


@pytest.mark.parametrize("make", [sharded, plain])
@pytest.mark.parametrize("name", FLOAT32)
def test_training_goes_on_as_in_deepspeed(runs, name, make):
    model, optimizer = restored(runs / name, make)
    facts = facts_of(runs / name)
    for step in range(3, 6):
        optimizer.zero_grad()
        loss = sum(loss_of(model, batch(step, rank)) for rank in range(WORLD_SIZE)) / WORLD_SIZE
        # DeepSpeed updates, and so decays, what no batch reached; torch leaves it alone
        (loss + 0 * sum(p.sum() for p in model.unused.parameters())).backward()
        clip = RUNS[name].get("gradient_clipping", 1.0)  # DeepSpeed's default
        if isinstance(optimizer, phicore.ZeroOptimizer):
            optimizer.clip_grad_norm_(clip)
        else:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        assert loss.item() == pytest.approx(facts["losses"][step], rel=2e-6)
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter, facts["weights"][key], rtol=0, atol=1e-6), key


@pytest.mark.parametrize("name", ["stage 1", "aligned"])
def test_state_is_what_deepspeed_says(runs, name):
    found, facts = read_checkpoint(runs / name / "three"), facts_of(runs / name)
    (group,) = found.optimizer["param_groups"]
    assert set(group["param_names"]) == set(facts["exp_avg"])
    assert (found.steps, found.loss_scale, group["lr"], group["weight_decay"]) == (3, 1.0, 0.01, 0.1)
    for number, key in zip(group["params"], group["param_names"], strict=True):
        state = found.optimizer["state"][number]
        assert torch.equal(state["step"], torch.tensor(3.0))
        assert torch.equal(state["exp_avg"], facts["exp_avg"][key]), key
        assert torch.equal(state["exp_avg_sq"], facts["exp_avg_sq"][key]), key


@pytest.mark.parametrize("name", [*FLOAT32, "bfloat16", "float16"])
def test_parameters_keep_the_order_in_which_they_were_given(runs, name):
    found = read_checkpoint(runs / name)
    given = [[n for n, _ in group["params"]] for group in groups(Net())]
    if len(found.optimizer["param_groups"]) == 1:
        given = [[n for n, p in Net().named_parameters() if p.requires_grad]]
    assert [group["param_names"] for group in found.optimizer["param_groups"]] == given


@pytest.mark.parametrize(
    ("name", "dtype", "scale"), [("bfloat16", torch.bfloat16, 1.0), ("float16", torch.float16, 64)]
)
def test_masters_of_16_bit_weights(runs, name, dtype, scale):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = read_checkpoint(runs / name)
    assert found.loss_scale == scale
    assert found.model["first.weight"].dtype == dtype
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(runs / name))
    trained = [n for n, p in Net().named_parameters() if p.requires_grad]
    assert sorted(found.optimizer["masters"]) == sorted(trained)
    for key in trained:
        assert torch.equal(found.optimizer["masters"][key], theirs[key]), key
    _, optimizer = restored(runs / name, sharded)
    again = optimizer.full_state_dict()
    assert all(torch.equal(again["masters"][key], theirs[key]) for key in trained)


def test_a_single_rank_with_padding(runs, copy):
    """One rank's masters lack the padding that its state has; and DeepSpeed's own Adam counts steps in integers."""
    folder = copy("stage 2")
    paths = [folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(WORLD_SIZE)]
    ranks = [torch.load(path, weights_only=False) for path in paths]
    expected = read_checkpoint(folder)
    one = ranks[0]["optimizer_state_dict"]
    parts = [rank["optimizer_state_dict"] for rank in ranks]
    one["partition_count"] = [1, 1]
    for index in range(2):
        joined = [part["single_partition_of_fp32_groups"][index] for part in parts]
        one["single_partition_of_fp32_groups"][index] = torch.cat(joined)
        state, settings = (
            one["base_optimizer_state"]["state"][index],
            one["base_optimizer_state"]["param_groups"][index],
        )
        for key in ("exp_avg", "exp_avg_sq"):
            values = [part["base_optimizer_state"]["state"][index][key] for part in parts]
            state[key] = torch.cat([*values, torch.zeros(5)])
        state["step"], settings["bias_correction"] = 3, True
    torch.save(ranks[0], paths[0])
    paths[1].unlink()
    found = read_checkpoint(folder)
    for number, state in expected.optimizer["state"].items():
        assert state.keys() == found.optimizer["state"][number].keys()
        assert all(torch.equal(value, found.optimizer["state"][number][key]) for key, value in state.items())
    plain(groups(Net())).load_state_dict(found.optimizer)
    settings["bias_correction"] = False
    torch.save(ranks[0], paths[0])
    with pytest.raises(ValueError, match="bias correction"):
        read_checkpoint(folder)


def test_views_and_empty_tensors_keep_their_shapes_in_another_dtype(tmp_path):
    """Only what is the very tensor that has a master, under another name, is made from it."""
    weight, master = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3) + 1 / 1024
    model = {"weight": weight.bfloat16(), "empty": torch.zeros(0, 3).bfloat16(), "other": torch.zeros(4, 0).bfloat16()}
    model |= {"tied": model["weight"], "transposed": model["weight"].t()}
    optimizer = {
        "state": {},
        "param_groups": [{"param_names": ["weight", "empty"]}],
        "masters": {"weight": master, "empty": torch.zeros(0, 3)},
    }
    found = in_dtype(DeepSpeedCheckpoint(model, optimizer, 1, 1.0, (), 1), torch.float32)
    written = load_file(write_weights(found, tmp_path / "weights"))
    exact = {"weight": master, "tied": master, "transposed": weight.t(), "empty": torch.zeros(0, 3)}
    assert written.keys() == {*exact, "other"}
    assert all(torch.equal(written[name], tensor) for name, tensor in exact.items())
    assert written["other"].shape == (4, 0)


def test_unread_kinds_are_refused(runs, copy):
    with pytest.raises(ValueError, match="elastic_checkpoint"):
        read_checkpoint(runs / "elastic")
    with pytest.raises(ValueError, match="no optimizer files of ZeRO"):
        read_checkpoint(runs / "plain" / "three")
    folder = copy("stage 2")
    for foreign in (
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
        "layer_00-model_states.pt",
    ):
        (folder / foreign).touch()
        with pytest.raises(ValueError, match=foreign):
            read_checkpoint(folder)
        (folder / foreign).unlink()
    read_checkpoint(folder)


def test_missing_files_are_named(runs, copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint of DeepSpeed"):
        read_checkpoint(tmp_path)
    folder = copy("stage 2")
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match="that of rank 1 is missing"):
        read_checkpoint(folder)
    (tmp_path / "aside").rename(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(FileNotFoundError, match="mp_rank_00_model_states"):
        read_checkpoint(folder)


@pytest.mark.parametrize("where", ["absolute", "../other", "in/../../other"])
def test_a_latest_that_leads_elsewhere_is_refused(copy, tmp_path, where):
    folder = copy("stage 2").rename(tmp_path / "other")
    (tmp_path / "run" / "in").mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text(str(folder) if where == "absolute" else where)
    with pytest.raises(ValueError, match=r"latest names '.*other', which is outside its directory"):
        read_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "latest").write_bytes(b"\xff")
    with pytest.raises(FileNotFoundError, match="no checkpoint of DeepSpeed"):
        read_checkpoint(tmp_path / "run")


def test_files_of_another_step_are_refused(runs, copy):
    folder = copy("bfloat16")
    path = folder / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    state["module"]["middle.weight"] = state["module"]["middle.weight"] + 0.5
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"middle\.weight: .* different steps"):
        read_checkpoint(folder)


class Runs:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_pickled_code_is_not_run(copy, tmp_path, file):
    folder = copy("stage 2")
    state = torch.load(folder / file, weights_only=False)
    torch.save({**state, "client": Runs(tmp_path / "made")}, folder / file)
    with pytest.raises(ValueError, match=r"names posix\.mkdir, which is not unpickled"):
        read_checkpoint(folder)
    # the stand-ins are not left behind for others
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=True)
    assert not (tmp_path / "made").exists()


class Reached:
    """Pickles as getattr of something, as Python 3.11.2 does with members of an enum."""

    def __init__(self, owner: type, name: str) -> None:
        self.of = owner, name

    def __reduce__(self) -> Any:
        return (getattr, self.of)


def test_a_stage_is_read_from_any_python_and_nothing_else_by_its_way(copy):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    folder = copy("stage 2")
    before = read_checkpoint(folder)
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)

    def save(stage: Any) -> None:
        torch.save({**state, "optimizer_state_dict": {**state["optimizer_state_dict"], "zero_stage": stage}}, path)

    save(Reached(ZeroStageEnum, "gradients"))
    found = read_checkpoint(folder)
    assert found.steps == before.steps
    assert all(torch.equal(found.model[name], value) for name, value in before.model.items())
    save(Reached(ZeroStageEnum, "weights"))
    with pytest.raises(ValueError, match="is of ZeRO stage 3"):
        read_checkpoint(folder)
    for owner, name in ((ZeroStageEnum, "from_bytes"), (LossScaler, "__init__"), (LossScaler, "__subclasses__")):
        save(Reached(owner, name))
        with pytest.raises(ValueError, match=f"is damaged: it asks for '{name}' of a class"):
            read_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 10, 3000])
def test_damaged_files_are_named(copy, length):
    folder = copy("stage 2")
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"rank_0_mp_rank_00_optim_states\.pt (is damaged|names)"):
        read_checkpoint(folder)


def test_it_needs_no_deepspeed(runs, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert read_checkpoint(runs / "float16").steps == 3


# ===== what a pickle can hold in place of a checkpoint =====

SMALL = {"w": torch.arange(4.0).view(2, 2), "b": torch.arange(4.0, 6)}
MODEL, RANK = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def small(folder: Path, spoil: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """A checkpoint of one group on two ranks, whose model file and first optimizer file are spoilt."""
    folder.mkdir()
    shapes = {name: tensor.shape for name, tensor in SMALL.items()}
    model = {"module": dict(SMALL), "param_shapes": [shapes], "global_steps": 1, "buffer_names": []}
    ranks = []
    for part in torch.cat([tensor.view(-1) for tensor in SMALL.values()]).chunk(2):
        inner = {"step": 1, "exp_avg": 2 * part, "exp_avg_sq": 3 * part}
        base = {"state": {0: inner}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        state = {"zero_stage": 1, "partition_count": 2, "base_optimizer_state": base, "loss_scaler": None}
        state |= {"single_partition_of_fp32_groups": [part.clone()], "param_slice_mappings": None}
        ranks.append(state | {"param_alignment_paddings": [[0] * len(SMALL)]})
    spoil(model, ranks[0])
    torch.save(model, folder / MODEL)
    for rank, state in enumerate(ranks):
        torch.save({"optimizer_state_dict": state}, folder / RANK.replace("rank_0_", f"rank_{rank}_", 1))
    return folder


def test_a_small_checkpoint_is_read(tmp_path):
    found = read_checkpoint(small(tmp_path / "x", lambda model, rank: None))
    assert found.optimizer["param_groups"][0]["param_names"] == ["w", "b"]
    for number, tensor in enumerate(SMALL.values()):
        assert torch.equal(found.optimizer["state"][number]["exp_avg"], 2 * tensor)


def test_many_parameters_are_read_and_converted_from_where_they_are(tmp_path, monkeypatch, most_held):
    many = {f"w{i}": torch.randn(64, 64) for i in range(80)}
    for name in list(SMALL):
        monkeypatch.delitem(SMALL, name)
    for name, tensor in many.items():
        monkeypatch.setitem(SMALL, name, tensor)
    folder = small(tmp_path / "x", lambda model, rank: model["module"].update(tied=many["w0"]))

    def convert() -> None:
        found = read_checkpoint(folder, mapped=True)
        write_weights(found, tmp_path / "weights")
        adopt(trained_tensors(found), found.optimizer, 1, tmp_path / "run", origin="DeepSpeed")

    mapped = sum(file.stat().st_size for file in folder.iterdir())  # which is counted too
    assert most_held(convert) < mapped + 8 * many["w0"].nbytes  # a tied weight, and one that lies in two files
    written = load_file(tmp_path / "weights/model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in (many | {"tied": many["w0"]}).items())
    tensors, optimizer = consolidate(next((tmp_path / "run/checkpoints").glob("step-*")))
    for number, (name, tensor) in enumerate(many.items()):
        assert torch.equal(tensors[name], tensor)
        assert torch.equal(optimizer["state"][number]["exp_avg"], 2 * tensor)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m, r: m.update(param_shapes=None), f'{MODEL} is damaged: its "param_shapes" must be a list .* None'),
        (lambda m, r: m["param_shapes"][0].update(w=(-2, -2)), rf'{MODEL} .*"param_shapes of w" .* \[-2, -2\]'),
        (lambda m, r: m["param_shapes"].append({}), f'{RANK} .*"single_partition_of_fp32_groups" must be a list of 2'),
        (lambda m, r: m.update(module=[1]), f'{MODEL} is damaged: its "module" must be tensors by name, and is list'),
        (lambda m, r: m["module"].update(w=5), f'{MODEL} is damaged: its "module w" must be a dense tensor, and is 5'),
        (lambda m, r: m.update(global_steps="x"), f"{MODEL} .*\"global_steps\" must be a count, and is 'x'"),
        (lambda m, r: m.update(buffer_names=[[]]), f'{MODEL} .*"buffer_names" must be a list of names'),
        (lambda m, r: r.update(partition_count="2"), f"{RANK} .*\"partition_count\" must be a count, .* is '2'"),
        (lambda m, r: r.update(partition_count=10**12), "is of 10{12} ranks .*; that of rank 2 is missing"),
        (lambda m, r: r.update(single_partition_of_fp32_groups=[]), f"{RANK} .* must be a list of 1 .* is list of 0"),
        (lambda m, r: r.update(base_optimizer_state={}), f'{RANK} .*"param_groups" must be a list of 1 .*is None'),
        (lambda m, r: r.update(param_alignment_paddings=[[0]]), f'{RANK} .*"param_alignment_paddings" .* 2 of them'),
        (lambda m, r: r["base_optimizer_state"]["state"][0].pop("exp_avg"), "differ in what they hold of group 0"),
        (lambda m, r: r["base_optimizer_state"]["state"][0].update(step="1"), f'{RANK} .*"state 0 step" must be a'),
    ],
)  # fmt: skip
def test_what_loads_but_is_no_checkpoint_is_refused_by_file_and_part(tmp_path, spoil, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_checkpoint(small(tmp_path / "x", spoil))


ODD = VALUES | st.sampled_from(
    [torch.ones(3, dtype=torch.int64), torch.ones(()), torch.ones(2, 2).to_sparse(), 10**400]
)


@given(data=st.data(), value=ODD | st.lists(ODD, max_size=2))
def test_any_value_in_any_place_gives_an_error_that_names_the_checkpoint_or_is_read(tmp_path_factory, data, value):
    def spoil(model: dict[str, Any], rank: dict[str, Any]) -> None:
        place: Any = data.draw(st.sampled_from([model, rank]))
        while True:
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                place[key] = value
                return
            place = inner

    folder = small(tmp_path_factory.mktemp("spoilt") / "x", spoil)
    try:
        read_checkpoint(folder)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    else:
        return
    assert str(folder) in message
