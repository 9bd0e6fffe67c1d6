"""Frozen weights that differ between ranks, or from those that a run began with, are told, down to one bit."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import phicore
from phicore.training import TrainConfig, Trainer, frozen
from phicore.training.frozen import checksum
from tests.training.small_run import examples, small_model

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool]


def reference(tensor: Tensor) -> int:
    """The sum written out in Python's integers."""
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    multipliers = [m % 2**64 for m in frozen._multipliers(tensor.device).tolist()]
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data) // 8 * 8, 8)]
    total = 0
    for start in range(0, len(words), frozen.CHUNK):
        part = words[start : start + frozen.CHUNK]
        total = total * frozen.MULTIPLIER + sum(w * m for w, m in zip(part, multipliers, strict=False))
    for byte in data[len(words) * 8 :]:
        total = total * frozen.MULTIPLIER + byte
    return total % 2**64


@given(st.integers(0, 40), st.sampled_from(DTYPES), st.integers(0, 3), st.integers(0, 2**20))
def test_every_byte_and_its_place_count(n: int, dtype: torch.dtype, offset: int, seed: int) -> None:
    """In chunks of four words, of tensors that may begin anywhere, against the formula."""
    generator = torch.Generator().manual_seed(seed)
    kept, frozen.CHUNK = frozen.CHUNK, 4
    frozen._multipliers.cache_clear()
    try:
        data = torch.randint(0, 2, (n + offset,), generator=generator) if dtype == torch.bool else torch.empty(0)
        data = data if dtype == torch.bool else torch.randint(0, 256, (n + offset,), generator=generator)
        tensor = data.to(dtype)[offset:]
        assert checksum(tensor) == reference(tensor)
        if n > 1:
            raw = tensor.clone().view(torch.uint8)
            raw[int(torch.randint(0, len(raw), (), generator=generator))] ^= 1
            assert checksum(raw) != checksum(tensor)
            if not torch.equal(tensor, tensor.flip(0)):
                assert checksum(tensor.flip(0)) != checksum(tensor)
    finally:
        frozen.CHUNK = kept
        frozen._multipliers.cache_clear()


@pytest.mark.filterwarnings("ignore:Sparse")  # beta, says torch
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_tensors_are_told_apart_by_elements_and_places(layout: str) -> None:
    """As graph networks keep their neighbours, in buffers."""

    def sparse(value: float = 2.0, place: int = 1) -> Tensor:
        dense = torch.eye(4)
        dense[0, place] = value
        options = {"blocksize": (2, 2)} if layout.startswith("b") else {}
        return dense.to_sparse() if layout == "coo" else getattr(dense, f"to_sparse_{layout}")(**options)

    assert checksum(sparse()) == checksum(sparse())
    assert len({checksum(sparse()), checksum(sparse(value=3.0)), checksum(sparse(place=3))}) == 3


def test_layout_in_memory_does_not_count() -> None:
    tensor = torch.randn(3, 5)
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    assert checksum(torch.empty(4, device="meta")) == checksum(torch.empty(0)) == 0


def test_a_tensor_made_of_others_is_what_these_are() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    found = [checksum(TwoTensor(*pair)) for pair in ((a, b), (a.clone(), b.clone()), (b, a), (a, a))]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def quantized() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(12, 64), nn.BatchNorm1d(64), nn.Linear(64, 12))
    return phicore.quantize_(model, ["2"])


def told(output: str, case: str) -> str:
    """What a rank is told where rank 1 has something else."""
    other = dist.get_rank() == 1
    model = quantized() if case in ("packed", "trained", "statistics") else small_model()
    model.requires_grad_(False)
    trained = model.get_parameter("head.bias" if case in ("one bit", "eval data", "save every") else "0.weight")
    trained.requires_grad_(True)
    with torch.no_grad():
        if other and case == "one bit":
            model.embed.weight.view(torch.int32)[-1, -1] ^= 1  # type: ignore[operator, union-attr, index]
        if other and case == "packed":
            model.get_buffer("2.packed")[7] ^= 16
        if other and case == "trained":
            trained.add_(1.0)  # rank 0's count
        if other and case == "statistics":
            model.get_buffer("1.running_mean").add_(1.0)
    config = TrainConfig(output=output, save_every=2 if other and case == "save every" else 0)
    data = examples(8 if other and case == "eval data" else 7)
    try:
        Trainer(model, config, examples(), data)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("one bit", "embed.weight: rank 1 has [12, 6] float32 with checksum "),
        ("packed", "2.packed: rank 1 has [384] uint8 with checksum "),
        ("trained", "nothing"),
        ("statistics", "nothing"),
        ("eval data", "rank 1 has examples to evaluate on=8 where rank 0 has examples to evaluate on=7"),
        ("save every", "rank 1 has save_every=2 where rank 0 has save_every=0"),
    ],
)
def test_the_first_that_differs_is_named_on_every_rank(tmp_path: Path, ranks, case: str, said: str) -> None:
    answers = ranks(3)(told, str(tmp_path), case)
    assert len(set(answers)) == 1
    assert answers[0].startswith(said)
    if "checksum" in said:
        assert answers[0].endswith("load the same base, quantized alike, on every rank")


def over(output: Path, changed: str = "", factor: float = 1.0) -> Trainer:
    """A run of an adapter over a base, one bit of which may be another, or a factor of a layer before it is coded."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(12, 64), nn.Linear(64, 12))
    model[1].weight.data *= factor  # type: ignore[union-attr, operator]
    phicore.quantize_(model)
    if changed:
        tensor = dict(model.state_dict())[changed]
        tensor.view(-1).view(torch.uint8)[0] ^= 1
    phicore.attach(model, phicore.LoRAConfig(rank=2, alpha=4, target_modules=["1"]))
    config = TrainConfig(output=str(output), resume=True, steps=2, batch_size=4)
    return Trainer(model, config, examples())


def test_a_run_goes_on_over_the_base_that_it_began_with(tmp_path: Path) -> None:
    assert over(tmp_path).fit().steps == 2
    for changed, name in (("0.weight", "0.weight"), ("1.packed", "1.base.packed")):
        trainer = over(tmp_path, changed)
        before = {name: p.clone() for name, p in trainer.parameters.items()}
        with pytest.raises(ValueError, match=rf"over another base: {re.escape(name)} \(of 1 tensors\) is .* and was "):
            trainer.fit()
        assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())
    for scale in ("1.offset", "1.nested_absmax"):  # whose last bits are those of a sum over threads
        assert over(tmp_path, scale).fit().steps == 2
    with pytest.raises(
        ValueError, match=r"another base: 1\.base\.absmax \(of 1 tensors\) is scales of mean .* and was"
    ):
        over(tmp_path, factor=2.0).fit()  # whose codes are the same


def test_a_base_that_lost_a_part_or_trains_it_now_is_another(tmp_path: Path) -> None:
    over(tmp_path).fit()
    trainer = over(tmp_path)
    trainer._base.pop("0.weight")
    with pytest.raises(ValueError, match=r"0\.weight .* is not there, or trains and was \[12, 64\] float32"):
        trainer.fit()
