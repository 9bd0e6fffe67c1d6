"""Which parts of fused layers an adapter has: it stands in the metadata of the safetensors file.

An adapter for each part of a fused layer is written as the plain adapter that it amounts to, which is what other
readers take it for: they pass over the metadata.
"""

import json
from pathlib import Path

from torch import Tensor, nn

from phicore.adapters.config import LoRAConfig
from phicore.adapters.experts import LoRAExperts
from phicore.adapters.fused import FusedLinear, diagonal_blocks, part_paths, part_sizes, splits
from phicore.adapters.layers import adapter_layers
from phicore.adapters.lora import LowRankLayer
from phicore.adapters.plan import plan
from phicore.formats.peft_fields import is_number, is_whole
from phicore.formats.peft_keys import own_rank, packed_attention, place_of, settings_of
from phicore.formats.safetensors_files import TensorFile, parse_json

PARTS = "phicore.parts"
"""Key of the metadata: JSON, name of a layer whose pair in the file is made of smaller ones -> its adapted parts (those
of a fused layer; or itself, under its last name) -> their [rank, alpha]."""

Parts = dict[str, dict[str, tuple[int, float]]]  # name of a fused layer -> its adapted parts -> their rank and alpha


def parts_of(layer: LowRankLayer | LoRAExperts) -> dict[str, tuple[int, float]]:
    """The adapted parts of a layer with their ranks and alphas; empty for a layer that is adapted whole."""
    if not isinstance(layer, FusedLinear):
        return {}
    return {part: (rank, layer.alphas[part]) for part, rank in layer.ranks.items()}


def filled_up(path: str, layer: LowRankLayer | LoRAExperts, parts: Parts) -> dict[str, tuple[int, float]]:
    """What the metadata would say of a layer that is filled up to a rank, if it says such a thing of it."""
    last = path.rpartition(".")[2]
    filled = isinstance(layer, LowRankLayer) and parts.get(path, {}).keys() == {last}
    return {last: (layer.rank, layer.alpha)} if filled else {}


def split_parts(model: nn.Module, name: str) -> Parts:
    """The layers of an adapter that `attach` would split as they are, and those that are filled up to a rank."""
    found: Parts = {}
    for path, layer in adapter_layers(model, name):
        if isinstance(layer, FusedLinear):
            try:
                known = part_sizes(model, path) == layer.sizes
            except ValueError:
                known = False  # put there by hand; a plain adapter of the same values is what a file can say
            if known:
                found[path] = parts_of(layer)
        elif isinstance(layer, LowRankLayer) and settings_of(model, path, layer)[1] != layer.rank:
            found[path] = {path.rpartition(".")[2]: (layer.rank, layer.alpha)}
    return found


def with_metadata(data: bytes, key: str, value: str) -> bytes:
    """A safetensors file with one more text in its metadata. Its own writer would put them in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][key] = value
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def read_parts(path: Path) -> Parts:
    """What the metadata of a file says. Raises ValueError if it is nothing that `save_adapter` writes."""
    text = TensorFile(path).metadata.get(PARTS, "{}")
    try:
        parts = parse_json(text.encode())
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {PARTS} is no JSON: {error}") from error
    sound = all(
        isinstance(of, dict)
        and (of.keys() <= part_paths(name).keys() or of.keys() == {name.rpartition(".")[2]})
        and all(isinstance(v, list) and len(v) == 2 and is_whole(v[0]) and is_number(v[1]) for v in of.values())
        for name, of in parts.items()
    )
    if not sound:
        raise ValueError(f"{path}: its metadata {PARTS} must give rank and alpha of parts of layers, got {text[:200]}")
    return {name: {part: (rank, alpha) for part, (rank, alpha) in of.items()} for name, of in parts.items()}


def check_parts(
    model: nn.Module, config: LoRAConfig | None, name: str, tensors: dict[str, Tensor], directory: Path
) -> None:
    """Raises ValueError where a part of a pair is to be loaded, and the file's pair is more than this part."""
    ranks: dict[str, int] = {}
    parts: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    if config is not None:
        targets = plan(model, config)[0]
        split = splits(model, config, targets)
        first: dict[nn.Module, str] = {}  # the place for which a file has a module that stands in several
        for path, module in targets.items():
            first.setdefault(module, path)
        ranks = {path: own_rank(model, config, path, split) for path in first.values() if packed_attention(model, path)}
        parts = {path: (split[path].sizes, split[path].ranks) for path in first.values() if path in split}
    else:
        for path, layer in adapter_layers(model, name):
            if isinstance(layer, LowRankLayer) and packed_attention(model, path):
                ranks[path] = layer.rank
            if isinstance(layer, FusedLinear):
                parts[path] = layer.sizes, layer.ranks
    for path, rank in ranks.items():
        A, B = (tensors[f"{place_of(model, path)}.lora_{which}.weight"] for which in "AB")
        if A[rank:].any() or B[:, rank:].any():
            raise ValueError(f"{directory}: the adapter of {path} has a higher rank than {rank}, which it has here")
    for path, (sizes, of) in parts.items():
        B = tensors[place_of(model, path) + ".lora_B.weight"]
        try:
            diagonal_blocks(B[:, : sum(of.values())], sizes, of)
        except ValueError as error:
            raise ValueError(f"{directory}: {path}: {error}; load it into a model without this adapter") from error
