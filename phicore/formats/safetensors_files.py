"""Safetensors files that nobody vouches for: what they claim is checked before a byte of a tensor is read.

A file is 8 bytes (the length of the header, little-endian), the header (a JSON object: tensor name -> dtype, shape and
the place of its bytes behind the header, start and end), and the bytes, without gaps. A model of several files has an
index beside them that says which file holds which tensor. Source: https://github.com/huggingface/safetensors#format.

Tensors are read one at a time into memory of their own, not mapped: a file that is cut or written over later can then
neither crash the process nor change a model, and memory in use is what was asked for.
"""

import json
import math
import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of a header, index or configuration. 100,000 tensors need about 15 MB; parsed JSON can take twenty times its text.
TEXT_LIMIT = 32 << 20
SHARD_BYTES = 2 << 30  # of a written file

NO_PICKLE = (
    "weights saved by pickle (.bin, .pt) are not read, since reading them can run any code: if you trust their author, "
    "load them with transformers or peft, whose save_pretrained writes safetensors"
)

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
UNREAD = ("F4", "F6_E2M3", "F6_E3M2")  # of the format, with more than one value in a byte; torch computes with none


# ===== one file =====


class UnreadDtype(ValueError):
    """A tensor is of a dtype of the format that is not read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says of one tensor; start and stop count bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file whose header is sound: every tensor has a dtype, a shape and just the bytes that these take.

    Args:
        path: of the file. It is opened here and at each `read`, and not kept open.

    Attributes:
        entries: what the header says of each tensor.
        metadata: the header's own texts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, or one with a dtype that is not read, naming it and, where there is
            one, the tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():  # a pipe, say, would block
            raise FileNotFoundError(f"no such file: {self.path}")
        try:
            with self.path.open("rb") as file:
                self.entries, self.metadata = _read_header(file)
        except UnreadDtype as error:
            raise ValueError(f"{self.path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{self.path} is not a whole safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            ValueError: the file has changed since its header was read.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if tensor.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                _fill(file, tensor.view(-1).view(torch.uint8).numpy().data, f"{self.path}: {name}")
        return tensor


def _fill(file: RawIOBase, buffer: memoryview, what: str) -> None:
    filled = 0
    while filled < len(buffer):  # one call reads 2 GiB at most
        count = file.readinto(buffer[filled:])
        if not count:
            raise ValueError(f"{what} ends {len(buffer) - filled} bytes early")
        filled += count


def _read_header(file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"it has {size} bytes, and its header alone would have {length}")
    if length > TEXT_LIMIT:
        raise ValueError(f"its header of {length} bytes is longer than {TEXT_LIMIT}")
    header = parse_json(file.read(length))
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) and _is_unicode(v) for v in metadata.values()):
        raise ValueError(f"its __metadata__ must be texts by name, got {_shown(metadata)}")
    entries = {name: _entry(name, described, 8 + length) for name, described in header.items()}
    end, previous = 8 + length, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(
                f"tensor {name} {'overlaps' if entry.start < end else 'leaves a gap behind'} {previous}: it begins at "
                f"byte {entry.start}, not {end}"
            )
        end, previous = entry.stop, name
    if end != size:
        raise ValueError(f"its last tensor ({previous}) ends at byte {end}, the file at {size}")
    return entries, metadata


def _entry(name: str, described: Any, begin: int) -> Entry:
    if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} must have dtype, shape and data_offsets, got {_shown(described)}")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if dtype in UNREAD:
        raise UnreadDtype(
            f"tensor {name} has dtype {dtype}, which is not read; convert it to one of {', '.join(DTYPES)}"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {_shown(dtype)}; {', '.join(DTYPES)} are read")
    if not are_sizes(shape):
        raise ValueError(f"tensor {name} has shape {_shown(shape)}, which is no list of sizes")
    if not are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has data_offsets {_shown(offsets)}, which are no start and end")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"tensor {name} has {stop - start} bytes, but {dtype} {_shown(shape)} takes "
            f"{math.prod(shape) * DTYPES[dtype].itemsize}"
        )
    return Entry(DTYPES[dtype], tuple(shape), begin + start, begin + stop)


def are_sizes(values: Any) -> bool:
    """Whether values is a list of at most 64 integers that a tensor can have as its sizes."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and value >= 0 for value in values)
        and math.prod(value or 1 for value in values) < 2**60  # torch computes strides of empty tensors too
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ===== JSON =====


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deep, not an object, or a name that stands twice in one or is half
            of a character.
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not JSON in UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is not a JSON object, but {type(found).__name__}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if not _is_unicode(name):
            raise ValueError(f"its name {name!r} is not Unicode")
        if name in found:
            raise ValueError(f"{name} stands twice in it")
        found[name] = value
    return found


def _is_unicode(text: str) -> bool:
    """Whether it has no surrogate without its other half, as JSON can have by an escape."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        ValueError: as `parse_json`, or a file longer than 32 MiB; naming the file.
    """
    if (size := path.stat().st_size) > TEXT_LIMIT:
        raise ValueError(f"{path}: its {size} bytes are more than {TEXT_LIMIT}")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ===== a model of one or several files =====


def model_tensors(directory: Path) -> dict[str, TensorFile]:
    """The file of each tensor of a model directory, in the files' order. Headers are read, tensors are not.

    As transformers does, it takes model.safetensors if there is one, and else the files of the index.

    Raises:
        FileNotFoundError: there is no safetensors file, or one that the index names is missing.
        ValueError: a damaged file or index; an index that names a file outside the directory, or the wrong one for a
            tensor; a tensor that stands in two files.
    """
    if (directory / WEIGHTS).is_file():
        file = TensorFile(directory / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    index = directory / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{directory} holds no weights; looked for {WEIGHTS} and {INDEX}{_pickled(directory)}")
    listed = index_files(index)
    names = sorted(set(listed.values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{directory} lacks {', '.join(absent)}, which its {INDEX} names")
    found: dict[str, TensorFile] = {}
    for file in (TensorFile(directory / name) for name in names):
        for key in file.entries:
            if key in found:
                raise ValueError(f"{key} stands in two files: {found[key].path} and {file.path}")
            found[key] = file
    for key, name in listed.items():
        if key not in found:
            raise ValueError(f"{directory / name} lacks {key}, which {index} places in it")
        if found[key].path.name != name:
            raise ValueError(f"{index} places {key} in {name}, but it stands in {found[key].path.name}")
    return found


def index_files(index: Path) -> dict[str, str]:
    """The name of the file of each tensor, as an index says.

    Raises:
        ValueError: a damaged index, or one that names a file outside its directory.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} has no weight_map, which says where each tensor is")
    for key, name in listed.items():
        if not _is_beside(name):
            raise ValueError(f"{index} places {key} in {_shown(name)}, which is no .safetensors file in its directory")
    return listed


def compare(
    expected: Mapping[str, Tensor], found: Mapping[str, TensorFile], tied: Iterable[set[str]] = ()
) -> tuple[list[str], list[str], list[str]]:
    """How a model's tensors and those of files differ: (missing, unexpected, of another shape or kind), all sorted.

    Of names that are tied, one is enough.
    """
    missing = expected.keys() - found.keys()
    for group in tied:
        if group & found.keys():
            missing -= group
    unlike, coded = [], coded_with_scales(expected, found)
    for key in sorted(expected.keys() & found.keys()):
        wanted, entry = expected[key], found[key].entries[key]
        if key in coded:
            unlike.append(f"{key} ({entry.dtype}, coded with a scale that stands beside it)")
        elif entry.shape != wanted.shape or entry.dtype.is_floating_point != wanted.is_floating_point():
            there, here = f"{entry.dtype} {list(entry.shape)}", f"{wanted.dtype} {list(wanted.shape)}"
            unlike.append(f"{key} ({there} in {found[key].path.name}, {here} in the model)")
    return sorted(missing), sorted(found.keys() - expected.keys()), unlike


def coded_with_scales(expected: Container[str], found: Mapping[str, TensorFile]) -> set[str]:
    """Tensors of 8-bit floats beside which (weight, weight_scale) stands a scale that the model has no place for. They
    are another library's codes: without the scale they are not the weights."""
    scaled = {key.rpartition(".")[0] for key in found if "scale" in key.rpartition(".")[2] and key not in expected}
    floats = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
    return {
        key for key, file in found.items() if file.entries[key].dtype in floats and key.rpartition(".")[0] in scaled
    }


def _is_beside(name: Any) -> bool:
    """Whether it is the plain name of a safetensors file, on any system: no folder, no drive, no "..", no NUL."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")


def _pickled(directory: Path) -> str:
    return f"; {NO_PICKLE}" if any(p.suffix in (".bin", ".pt", ".pth") for p in directory.glob("*")) else ""


def write_model(groups: Iterable[Mapping[str, Tensor]], directory: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes tensors as a model directory's files, holding no more than one file's in memory.

    One file is called model.safetensors; several get an index.

    Args:
        groups: tensors by name; a group stays in one file.
        directory: exists, and holds no such files.
        shard_bytes: a file takes no further group that would make it longer than this.

    Returns:
        Bytes of all tensors.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(held, directory / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for group in groups:
        size = sum(tensor.nbytes for tensor in group.values())
        if held and sum(tensor.nbytes for tensor in held.values()) + size > shard_bytes:
            flush()
        held |= group
        total += size
        del group  # or it would stay while the next is made
    flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [WEIGHTS]
    for i, name in enumerate(names):
        (directory / f"{i}.part").rename(directory / name)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
