"""A model directory on disk to one in NF4, a tensor at a time: the model is never in memory.

A weight is dropped when it is coded, so the peak is one written file, which is no longer than the longest that is read,
and one layer's weight beside it.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phicore import atomic
from phicore.formats.bitsandbytes import cast, dtypes_kept, name_parts, tied_groups, write_config
from phicore.formats.hub import snapshot
from phicore.formats.huggingface import (
    CONFIG,
    dense_config,
    find_model,
    import_transformers,
    look_into,
    meta_model,
    plain_errors,
    quiet_transformers,
)
from phicore.formats.safetensors_files import SHARD_BYTES, TensorFile, compare, model_tensors, write_model
from phicore.modules import ALL_LINEAR
from phicore.nf4.convert import quantize_
from phicore.nf4.linear import NF4Linear
from phicore.nf4.tensor import quantize

# What a tokenizer, a chat template and generation settings are read from; code (.py) is not among it.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*.jinja", "generation_config.json", "LICENSE*",
)  # fmt: skip


logger = logging.getLogger(__name__)


class NotStreamable(ValueError):
    """The files name their tensors otherwise than transformers' model does; only transformers can put them together."""


def quantize_directory(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    dtype: torch.dtype = torch.bfloat16,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: Sequence[str] = (),
    *,
    block_size: int = 64,
    double_quant: bool = True,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[int, int]:
    """Writes a transformers model directory in bitsandbytes' NF4, without loading the model.

    The tensors are those that `load_model(source, dtype)`, `quantize_` and `save_model` would write; tokenizer, chat
    template and generation settings are copied as they are.

    Args:
        source: directory of a causal language model with safetensors weights, or its name on the Hugging Face hub,
            which is fetched into the hub's cache if it is not there.
        directory: to be made; must be missing or empty. It appears whole or not at all.
        dtype: of what is not quantized; a weight is rounded to it before it is coded. Also the compute dtype that
            config.json names.
        target_modules, exclude_modules, block_size, double_quant: as in `phicore.quantize_`.
        overwrite: replace a directory that is there. The old one is removed last.
        shard_bytes: length of a written file, at most that of the longest file of source (or of one tensor).

    Returns:
        Bytes of the tensors read and written.

    Raises:
        NotStreamable: see there; `load_model` may read the directory.
        FileExistsError: directory is not empty and overwrite is False.
        FileNotFoundError: source lacks its configuration, weights or tokenizer.
        OSError: source is no directory, and the hub does not answer to it.
        ValueError: as `load_model` and `quantize_`; nothing is then written.
    """
    atomic.check_free(directory, overwrite=overwrite)
    found, gguf_file = find_model(os.fspath(source))
    if not Path(found).is_dir():
        with quiet_transformers(import_transformers(), bars=True), plain_errors(found, local=False):
            found, gguf_file = find_model(str(snapshot(found, [CONFIG, *COMPANIONS], look_into)))
    atomic.check_apart(directory, found)
    if gguf_file is not None:
        raise NotStreamable(f"{source} is no directory of safetensors files")
    source = Path(found)
    weights = model_tensors(source)
    with quiet_transformers(import_transformers(), bars=False):
        model = meta_model(dense_config(source), dtype)
        _check_fit(model, weights, source)
        kept = dtypes_kept(model, dtype)
        quantize_(model, target_modules, exclude_modules, block_size=block_size, double_quant=double_quant)
        layers = {f"{path}.weight": layer for path, layer in model.named_modules() if isinstance(layer, NF4Linear)}
        shared = set().union(*tied_groups(model)) | (layers.keys() - weights.keys())
        if untied := sorted(layers.keys() & shared):
            raise ValueError(f"{untied[0]} is tied to another weight, and cannot be coded alone; leave it out")
        longest = max(file.path.stat().st_size for file in weights.values())
        with atomic.new_directory(directory, overwrite=overwrite) as temporary:
            written = write_model(
                _coded(weights, layers, {*layers, *model.state_dict()}, kept), temporary, min(shard_bytes, longest)
            )
            write_config(model, temporary)
            _copy_companions(source, temporary)
    read = sum(file.entries[key].stop - file.entries[key].start for key, file in weights.items())
    return read, written


def _coded(
    weights: Mapping[str, TensorFile],
    layers: Mapping[str, NF4Linear],
    known: Set[str],
    kept: Callable[[str], torch.dtype],
) -> Iterator[dict[str, Tensor]]:
    for key, file in weights.items():
        if key not in known:
            continue
        tensor = cast(file.read(key), kept(key), f"{file.path}: {key}")
        layer = layers.get(key)
        if layer is None:
            yield {key: tensor}
            continue
        try:
            weight = quantize(tensor, layer.block_size, layer.double_quant)
        except ValueError as error:
            raise ValueError(f"{file.path}: {key}: {error}") from error
        del tensor  # or it would stay while a file is written
        yield name_parts(key, weight)


def _check_fit(model: Any, weights: Mapping[str, TensorFile], source: Path) -> None:
    """Raises unless the files give each tensor of the model, under its name and in its shape."""
    missing, unexpected, unlike = compare(model.state_dict(), weights, tied_groups(model))
    if missing and unexpected:
        raise NotStreamable(f"{source} names tensors otherwise than the model, e.g. {unexpected[0]} and {missing[0]}")
    for what, keys in (("missing weights", missing), ("weights of another shape or kind", unlike)):
        if keys:
            raise ValueError(f"{source} does not fit the model that its {CONFIG} describes: {what}: {keys[:10]}")
    if unexpected:
        logger.warning("%s: weights that the model does not use, and that are left out: %s", source, unexpected[:10])


def _copy_companions(source: Path, directory: Path) -> None:
    for file in {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}:
        target = directory / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
