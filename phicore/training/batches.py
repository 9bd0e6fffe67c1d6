"""From examples to a batch on its device, and what the loop asks of either."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import IterableDataset, default_collate

from phicore.training.data import collate

Batch = Any
TOKENS = ("input_ids", "labels")


class Indexed(Protocol):
    """Examples by number: a list, or a dataset of torch or of the hub, which are no Sequence."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def make_batch(examples: list[Any]) -> Batch:
    """Pads dicts of input_ids and labels, and of attention_mask if they have one; stacks others as torch does."""
    first = examples[0]
    if isinstance(first, Mapping) and {*TOKENS} <= first.keys() <= {*TOKENS, "attention_mask"}:
        return collate(examples, pad_id=0)  # attention_mask and labels hide the padding
    try:
        return default_collate(examples)
    except (RuntimeError, TypeError, KeyError) as error:  # of unequal shapes, of a type that it does not know, of keys
        raise ValueError(
            f"examples like {kind_of(first)} cannot be stacked to a batch: {error}. Only dicts of input_ids and "
            f"labels (and attention_mask, if they have one) are padded; give such, or examples of one shape, or the "
            f"Trainer a collate_fn"
        ) from error


def kind_of(given: Any) -> str:
    """An example's or a batch's type, and the keys of one that has keys."""
    kind = type(given).__name__
    return f"{kind} with {', '.join(map(str, given)) or 'no key'}" if isinstance(given, Mapping) else kind


def check_indexed(name: str, data: Any) -> None:
    """Refuses data that does not give its examples by index.

    Raises:
        TypeError: it has no length or takes no index (an IterableDataset, a generator), or is a dict or a file's name.
    """
    others = isinstance(data, IterableDataset | Mapping | str)  # torch gives the first an index that raises
    if others or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"{name} is of type {type(data).__name__}; examples are taken by number, so that a run can be resumed: "
            f"give a list, or a dataset that has a length and takes an index (of a stream, list(stream); of a "
            f"DataLoader, its dataset; of a dict of splits, one of them; of a file, what load_dataset makes of it)"
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors, at any depth, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, PackedSequence):  # one part of it stays on the CPU
        return batch.to(device)  # type: ignore[arg-type]
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        # a namedtuple takes them singly
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def count_tokens(batch: Batch, items: float) -> int:
    """Tokens of a batch without padding, as its attention mask [B, T] tells; else the items that the loss counted."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return int(mask.count_nonzero()) if isinstance(mask, Tensor) and mask.dim() == 2 else int(items)


def length_of(example: Any) -> int:
    """Tokens of an example; 0 where it has none."""
    return len(example["input_ids"]) if isinstance(example, Mapping) and "input_ids" in example else 0


def lengths_of(data: Indexed) -> list[int]:
    """Tokens of each example.

    Raises:
        ValueError: they have none.
    """
    lengths = [length_of(data[i]) for i in range(len(data))]
    if not any(lengths):
        raise ValueError(f"group_by_length needs examples with input_ids, got {type(data[0]).__name__}")
    return lengths


def cut(indices: list[int], parts: int) -> list[list[int]]:
    """Cuts a list into at most `parts` runs of nearly equal length, none empty."""
    bounds = [len(indices) * i // parts for i in range(parts + 1)]
    return [indices[a:b] for a, b in pairwise(bounds) if a < b]


def chunks(indices: list[int], size: int) -> list[list[int]]:
    """Cuts a list into runs of `size`, the last one as long as it comes."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]
