"""Reading safetensors files: what the safetensors library writes is read alike, and what is spoilt is named."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from phicore.formats import safetensors_files
from phicore.formats.safetensors_files import (
    DTYPES,
    INDEX,
    WEIGHTS,
    TensorFile,
    compare,
    model_tensors,
    parse_json,
    read_json,
    write_model,
)
from tests.spoilt import VALUES


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def write(path: Path, header: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(start: int, stop: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


# ===== one file =====


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=6),
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=6, max_size=6),
    metadata=st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)
def test_reads_what_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    dtypes: list[str],
    metadata: dict[str, str] | None,
) -> None:
    given_ = {}
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False)):
        values = torch.randint(0, 2, shape) if dtype == "BOOL" else torch.randint(0, 100, shape)
        given_[f"t{i}ä"] = values.to(DTYPES[dtype])
    path = tmp_path_factory.mktemp("file") / "some.safetensors"
    save_file(given_, path, metadata)
    file = TensorFile(path)
    assert file.entries.keys() == given_.keys()
    for name, tensor in given_.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found), bits(tensor))
        assert found.data_ptr() % found.element_size() == 0


def test_what_is_read_is_not_tied_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    tensor = TensorFile(path).read("a")
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tensor, torch.arange(1000.0))


def test_what_is_read_is_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    save_file({"a": torch.arange(10.0)}, tmp_path / "some.safetensors")
    with torch.device("meta"):
        tensor = TensorFile(tmp_path / "some.safetensors").read("a")
    assert torch.equal(tensor, torch.arange(10.0))


def test_a_file_that_is_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(ValueError, match=r"some\.safetensors: a ends 5 bytes early"):
        file.read("a")


GOOD = json.dumps({"a": entry(0, 8)}).encode()


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(0, 8)}, 7, r"its last tensor \(a\) ends at byte \d+, the file at"),
        ({"a": entry(0, 8)}, 9, r"its last tensor \(a\) ends at byte"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor b overlaps a"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "tensor b overlaps a"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "tensor b leaves a gap behind a"),
        ({"a": entry(4, 12)}, 12, "tensor a leaves a gap behind the header"),
        ({"a": entry(0, 8, (3,))}, 8, r"tensor a has 8 bytes, but F32 \[3\] takes 12"),
        ({"a": entry(0, 8, (1,))}, 8, r"tensor a has 8 bytes, but F32 \[1\] takes 4"),
        ({"a": entry(8, 0)}, 8, "tensor a has -8 bytes"),
        ({"a": entry(0, 8, (-2,))}, 8, r"tensor a has shape \[-2\]"),
        ({"a": entry(0, 8, (-1, -2))}, 8, r"tensor a has shape \[-1, -2\]"),
        ({"a": entry(0, 0, (0, 2**62, 2**62))}, 0, "tensor a has shape"),
        ({"a": entry(0, 8, (2**50, 2**9))}, 8, r"tensor a has 8 bytes, but F32 .* takes \d{19}"),
        ({"a": entry(0, 4, [1] * 65)}, 4, "tensor a has shape"),
        ({"a": entry(0, 8, (True, 2))}, 8, "tensor a has shape"),
        ({"a": entry(0, 8, (2.0,))}, 8, "tensor a has shape"),
        ({"a": entry(0, 8, "2")}, 8, "tensor a has shape"),
        ({"a": entry(0, 8, (2,), "F31")}, 8, "tensor a has dtype 'F31'; BOOL, U8"),
        ({"a": entry(0, 8, (2,), ["F32"])}, 8, r"tensor a has dtype \['F32'\]"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "tensor a has data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]}}, 8, "tensor a has data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "tensor a must have dtype, shape and data_offsets"),
        ({"a": 5}, 8, "tensor a must have dtype, shape and data_offsets, got 5"),
        (GOOD[:-1] + b"," + GOOD[1:], 8, "a stands twice"),
        (b"[]", 0, "not a JSON object, but list"),
        (b"{", 0, "not JSON"),
        (b"\xff{}", 0, "not JSON in UTF-8"),
        (b'{"__metadata__":' + b"[" * 100_000, 0, "nested too deep"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "integer string conversion"),
    ],
)
def test_a_spoilt_header_is_refused_by_file_and_tensor(tmp_path: Path, header: Any, size: int, message: str) -> None:
    path = write(tmp_path / "some.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=r"some\.safetensors is not a whole safetensors file: .*" + message):
        TensorFile(path)


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F4", [4, 4], 8), ("F6_E2M3", [4], 3), ("F6_E3M2", [4], 3)])
def test_a_dtype_of_the_format_that_torch_lacks_is_named(tmp_path: Path, dtype: str, shape: Any, size: int) -> None:
    path = write(tmp_path / "some.safetensors", {"a": entry(0, size, shape, dtype)}, bytes(size))
    with safe_open(path, "pt") as file:  # the file is whole
        assert list(file.keys()) == ["a"]
    message = f"some.safetensors: tensor a has dtype {dtype}, which is not read; convert it to one of BOOL, U8, .*F32"
    with pytest.raises(ValueError, match=message):
        TensorFile(path)


@pytest.mark.parametrize("length", [9, 10_000, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(ValueError, match=f"its header alone would have {length}"):
        TensorFile(write(tmp_path / "some.safetensors", b"{}", b"123456", length))


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "some.safetensors").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"it has {size} bytes"):
        TensorFile(tmp_path / "some.safetensors")


def test_an_oversized_header_and_text_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "TEXT_LIMIT", 100)
    with pytest.raises(ValueError, match="its header of 101 bytes is longer than 100"):
        TensorFile(write(tmp_path / "some.safetensors", b"{}".ljust(101)))
    TensorFile(write(tmp_path / "some.safetensors", b"{}".ljust(100)))
    (tmp_path / "some.json").write_text("{}".ljust(101))
    with pytest.raises(ValueError, match=r"some\.json: its 101 bytes are more than 100"):
        read_json(tmp_path / "some.json")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            TensorFile(path)


def outcome(read: Callable[[], dict[str, Any]]) -> dict[str, Any] | ValueError | OSError:
    """What it returns or raises."""
    try:
        return read()
    except (ValueError, OSError) as error:
        return error


@given(data=st.data())
def test_spoilt_bytes_give_an_error_or_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is accepted here is accepted, to the same bits, by the safetensors library."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.uint8), "c": torch.ones(0, 3)}
    whole = save(tensors)
    length = 8 + int.from_bytes(whole[:8], "little")
    kind = data.draw(st.sampled_from(["flip", "cut", "value", "offsets"]))
    path = tmp_path_factory.mktemp("spoilt") / "some.safetensors"
    if kind == "flip":
        at = data.draw(st.one_of(st.integers(0, length - 1), st.integers(0, len(whole) - 1)))
        patch = data.draw(st.binary(min_size=1, max_size=4))
        path.write_bytes((whole[:at] + patch + whole[at + len(patch) :])[: len(whole)])
    elif kind == "cut":
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        header = json.loads(whole[8:length])
        name, field = data.draw(st.sampled_from(["a", "b", "c"])), data.draw(st.sampled_from([*header["a"], None]))
        sizes = st.lists(st.integers(0, 30), max_size=3)
        value = data.draw(VALUES if kind == "value" else sizes)
        header[name] = value if field is None else header[name] | {field: value}
        write(path, header, whole[length:])
    found = outcome(lambda: {key: file.read(key) for file in [TensorFile(path)] for key in file.entries})
    if not isinstance(found, dict):
        assert str(path) in str(found)
        return
    with safe_open(path, framework="pt") as theirs:
        assert set(theirs.keys()) == found.keys()
        for key, tensor in found.items():
            other = theirs.get_tensor(key)
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(other), bits(tensor))


HALF = "\ud800"  # of a character; in JSON an escape


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({HALF: entry(0, 8)}, r"its name '\\ud800' is not Unicode"),
        ({"__metadata__": {HALF: "x"}, "a": entry(0, 8)}, r"its name '\\ud800' is not Unicode"),
        ({"__metadata__": {"x": HALF}, "a": entry(0, 8)}, "its __metadata__ must be texts by name"),
        ({"__metadata__": {"x": 1}, "a": entry(0, 8)}, r"its __metadata__ must be texts by name, got {'x': 1}"),
        ({"__metadata__": {"x": None}, "a": entry(0, 8)}, "its __metadata__ must be texts by name"),
        ({"__metadata__": "x", "a": entry(0, 8)}, "its __metadata__ must be texts by name, got 'x'"),
        ({"__metadata__": [], "a": entry(0, 8)}, r"its __metadata__ must be texts by name, got \[\]"),
        ({"__metadata__": None, "a": entry(0, 8)}, None),
        ({"__metadata__": {}, "😀": entry(0, 8)}, None),
        ({"a": entry(0, 8, (1,), "C64")}, None),
        ({"a": entry(0, 8, (2, 4), "F8_E4M3FNUZ")}, None),
        ({"a": entry(0, 8, (2, 4), "F8_E5M2FNUZ")}, None),
        ({"a": entry(0, 8, (2, 4), "F8_E8M0")}, None),
        ({"a": entry(0, 8, (1,), "C32")}, "tensor a has dtype 'C32'"),
    ],
)
def test_headers_are_taken_as_safetensors_takes_them(tmp_path: Path, header: Any, message: str | None) -> None:
    path = write(tmp_path / "some.safetensors", header, bytes(range(8)))
    if message is not None:
        with pytest.raises(ValueError, match=message):
            TensorFile(path)
        with pytest.raises(SafetensorError):
            load_file(path)
        return
    file = TensorFile(path)
    for name, tensor in load_file(path).items():
        assert (file.read(name).dtype, file.read(name).shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(file.read(name)), bits(tensor))


def test_what_is_refused_here_and_not_by_safetensors_is_a_tensor_of_two_types(tmp_path: Path) -> None:
    twice = GOOD[:-1] + b"," + json.dumps({"a": entry(0, 8, (2,), "I32")}).encode()[1:]
    path = write(tmp_path / "some.safetensors", twice, bytes(8))
    assert load_file(path)["a"].dtype == torch.int32
    with pytest.raises(ValueError, match="a stands twice"):
        TensorFile(path)
    with pytest.raises(SafetensorError):
        load_file(write(tmp_path / "some.safetensors", {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)))


@given(text=st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_text_is_an_object_or_an_error(text: bytes) -> None:
    found = outcome(lambda: parse_json(text))
    assert isinstance(found, dict) or str(found)


def test_many_names_are_read_in_linear_time(tmp_path: Path) -> None:
    names = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(30_000))
    assert len(TensorFile(write(tmp_path / "some.safetensors", f"{{{names}}}".encode())).entries) == 30_000
    with pytest.raises(ValueError, match="t29999 stands twice"):
        TensorFile(write(tmp_path / "some.safetensors", f'{{{names},"t29999":1}}'.encode()))


# ===== a model of one or several files =====


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """a and b in a first file, c in a second."""
    groups = [{"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.ones(4)}]
    assert write_model(groups, tmp_path, 20) == 36
    return tmp_path


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def place(directory: Path, **where: Any) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= where
    (directory / INDEX).write_text(json.dumps(index))


@given(
    sizes=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=1, max_size=8),
    limit=st.integers(1, 60),
)
def test_written_models_are_read_and_files_keep_to_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], limit: int
) -> None:
    directory = tmp_path_factory.mktemp("model")
    groups = [{f"{i}.{j}": torch.rand(n) for j, n in enumerate(group)} for i, group in enumerate(sizes)]
    assert write_model(groups, directory, limit) == 4 * sum(map(sum, sizes))
    tensors = {name: tensor for group in groups for name, tensor in group.items()}
    found = model_tensors(directory)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].read(name), tensor) for name, tensor in tensors.items())
    held: dict[Path, list[int]] = {}
    for i, group in enumerate(groups):
        (path,) = {found[name].path for name in group}  # a group is not torn apart
        held.setdefault(path, []).append(4 * sum(sizes[i]))
    assert all(sum(group_sizes) <= limit or len([n for n in group_sizes if n]) <= 1 for group_sizes in held.values())
    assert {path.name for path in directory.iterdir()} == {p.name for p in held} | ({INDEX} if len(held) > 1 else set())
    if len(held) == 1:
        assert next(iter(held)).name == WEIGHTS
    else:
        index = json.loads((directory / INDEX).read_text())
        assert index["metadata"]["total_size"] == 4 * sum(map(sum, sizes))
        assert index["weight_map"] == {name: found[name].path.name for name in tensors}


@pytest.mark.parametrize(
    "name",
    [
        "../../x.safetensors", "/etc/x.safetensors", "sub/../../x.safetensors", "sub/x.safetensors", "..", ".", "",
        "..\\x.safetensors", "C:x.safetensors", "x\0.safetensors", "pytorch_model.bin", 5, None, ["x.safetensors"],
    ],
)  # fmt: skip
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, name: Any) -> None:
    outside = sharded.parent / "x.safetensors"
    save_file({"c": torch.ones(4)}, outside)
    place(sharded, c=name)
    with pytest.raises(ValueError, match=rf"{INDEX} places c in .*, which is no \.safetensors file in its directory"):
        model_tensors(sharded)
    outside.unlink()


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    place(sharded, d="model-00003.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"lacks model-00003\.safetensors, which its {INDEX} names"):
        model_tensors(sharded)


def test_an_index_that_places_a_tensor_wrongly(sharded: Path) -> None:
    place(sharded, b=SECOND)
    with pytest.raises(ValueError, match=rf"places b in {SECOND}, but it stands in {FIRST}"):
        model_tensors(sharded)
    place(sharded, b=FIRST, c=FIRST)  # the second file is then not named at all
    with pytest.raises(ValueError, match=rf"{FIRST} lacks c, which .*{INDEX} places in it"):
        model_tensors(sharded)


def test_an_index_that_names_a_missing_tensor(sharded: Path) -> None:
    place(sharded, d=FIRST)
    with pytest.raises(ValueError, match=rf"{FIRST} lacks d, which .*{INDEX} places in it"):
        model_tensors(sharded)


def test_a_tensor_in_two_files(sharded: Path) -> None:
    save_file({"a": torch.ones(2), "c": torch.ones(4)}, sharded / SECOND)
    with pytest.raises(ValueError, match=f"a stands in two files: .*{FIRST} and .*{SECOND}"):
        model_tensors(sharded)


def test_a_damaged_file_among_several(sharded: Path) -> None:
    os.truncate(sharded / SECOND, (sharded / SECOND).stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"{SECOND} is not a whole safetensors file: its last tensor \(c\)"):
        model_tensors(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_not_an_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        model_tensors(sharded)


@given(changes=st.dictionaries(st.sampled_from("abcd"), VALUES | st.sampled_from([FIRST, SECOND, WEIGHTS]), min_size=1))
def test_any_index_gives_an_error_or_the_tensors(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("model")
    write_model([{"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.ones(4)}], directory, 20)
    place(directory, **changes)
    found = outcome(lambda: model_tensors(directory))
    if not isinstance(found, dict):
        assert INDEX in str(found)
        return
    assert {key: file.path.name for key, file in found.items()} == {"a": FIRST, "b": FIRST, "c": SECOND}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickled_weights_are_not_read_and_it_is_said_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"holds no weights; looked for {WEIGHTS} and {INDEX}$"):
        model_tensors(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"saved by pickle.*load them with transformers or peft.*safetensors$"):
        model_tensors(tmp_path)


def test_a_single_file_goes_before_an_index(sharded: Path) -> None:
    save_file({"z": torch.ones(1)}, sharded / WEIGHTS)
    assert list(model_tensors(sharded)) == ["z"]  # as transformers has it


def test_how_files_and_models_differ(sharded: Path) -> None:
    expected = {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.int64), "d": torch.ones(1), "e": torch.ones(1)}
    missing, unexpected, unlike = compare(expected, model_tensors(sharded), [{"a", "d"}])
    assert (missing, unexpected) == (["e"], ["c"])
    assert unlike == [f"b (torch.float32 [3] in {FIRST}, torch.int64 [3] in the model)"]
    expected = {"a": torch.ones(1, 2)}
    assert compare(expected, model_tensors(sharded))[2] == [
        f"a (torch.float32 [2] in {FIRST}, torch.float32 [1, 2] in the model)"
    ]
