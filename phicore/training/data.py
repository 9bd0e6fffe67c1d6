"""Datasets of tokenised examples, the batches made of them, and the order in which a run visits them."""

import functools
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from phicore.training.encoding import IGNORE_INDEX, Encoded, UnstableTemplate, check_sequence_length, encode
from phicore.training.records import Record, read_records

Example = dict[str, torch.Tensor]
"""input_ids and labels, int64 [n] each."""


class TokenDataset(Sequence[Example]):
    """Encoded records: each item a dict of input_ids and labels, int64 [n].

    A token counts as loss-bearing when the model predicts it: it has a label and is not the first.

    Args:
        examples: records, each with what it was encoded to.
        sequence_length: to which they were cut.
        ends: tokens at which generation stops, or may.

    Attributes:
        records: of each example, in the file's order. Those of a conversation that was taken apart are only_last.
        truncated: examples that were cut to sequence_length.
        without_loss: examples whose tokens, after the cut, carry no loss. They are kept: dropping them would shift
            the order of the data.
        straddling: examples where a token spans the end of the prompt and the start of the answer.
        left_out: examples of which the chat template does not render a system or user message.
        open_ended: uncut examples whose last learnt token is none of `ends`: nothing in them teaches the model to stop.
        tokens: tokens of all examples after the cut.
        loss_tokens: those of them that carry loss.
    """

    def __init__(self, examples: Iterable[tuple[Record, Encoded]], sequence_length: int, ends: Collection[int]) -> None:
        self.records: list[Record] = []
        self.sequence_length = sequence_length
        self.longest = self.truncated = self.without_loss = self.straddling = self.left_out = self.open_ended = 0
        self.tokens = self.loss_tokens = 0
        self._examples: list[Example] = []
        for record, e in examples:  # one at a time: as lists, a file's tokens take four times this memory
            self.records.append(record)
            learnt = [label for label in e.labels if label != IGNORE_INDEX]
            with_loss = sum(label != IGNORE_INDEX for label in e.labels[1:])
            self.longest = max(self.longest, e.length)
            self.truncated += e.truncated
            self.without_loss += with_loss == 0
            self.straddling += e.straddles
            self.left_out += e.left_out
            self.open_ended += bool(learnt) and not e.truncated and learnt[-1] not in ends
            self.tokens += len(e.input_ids)
            self.loss_tokens += with_loss
            self._examples.append(
                {
                    "input_ids": torch.tensor(e.input_ids, dtype=torch.int64),
                    "labels": torch.tensor(e.labels, dtype=torch.int64),
                }
            )

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._examples[index]

    def report(self) -> str | None:
        """What a user should know about the data before training on it, in sentences; None when there is nothing."""
        n = len(self)
        sentences = []
        if apart := [record.line for record in self.records if record.only_last]:
            sentences.append(
                f"The chat template renders an answer otherwise once more turns follow it, so "
                f"conversations were taken apart, an example for each answer ({len(set(apart))} into {len(apart)})."
            )
        if self.truncated:
            sentences.append(
                f"{self.truncated} of {n} examples are longer than {self.sequence_length} tokens and were cut "
                f"(the longest has {self.longest})."
            )
        if self.without_loss:
            sentences.append(f"{self.without_loss} of {n} examples are left with no token to learn.")
        if self.straddling:
            sentences.append(
                f"In {self.straddling} of {n} examples one token spans the end of the prompt and the start of the "
                f"answer and is not learnt; move the space between the two from the prompt to the answer."
            )
        if self.left_out:
            sentences.append(
                f"In {self.left_out} of {n} examples the chat template leaves out or rewrites what a system or user "
                f"message says, so the model does not see it as it stands in the file; put a system message that the "
                f"template drops into the first user message."
            )
        if self.open_ended:
            sentences.append(
                f"In {self.open_ended} of {n} examples the answer ends without a special token, so the model does not "
                f"learn to stop; take a chat template that puts eos, or another special token, after a turn."
            )
        extra = sorted({key for record in self.records for key in record.extra})
        if extra:
            sentences.append(f"Keys that are not used were ignored: {', '.join(extra)}.")
        return " ".join(sentences) or None


def load_dataset(
    path: str | os.PathLike[str], tokenizer: Any, sequence_length: int, limit: int | None = None
) -> TokenDataset:
    """Reads a JSONL file and encodes it; what happened to the data is counted, and told by its report().

    A conversation of several answers is one example where the chat template lets it be (see `encode`). Where it does
    not, as Qwen3's, which drops thoughts from all answers but the last, each answer becomes an example of its own.

    Args:
        path: see `read_records`.
        tokenizer: see `encode`.
        sequence_length: tokens of the longest example; longer ones are cut.
        limit: how many records to take from the start, None for all. All lines are read and checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what `read_records` and `encode` raise, naming file and line; sequence_length or limit not above
            0; no example has a token that carries loss.
    """
    check_sequence_length(sequence_length)
    if limit is not None and limit <= 0:
        raise ValueError(f"limit must be above 0, or None for all records, got {limit}")
    records = read_records(path)[:limit]

    def examples() -> Iterator[tuple[Record, Encoded]]:
        for record in records:
            try:
                yield from _encode(record, tokenizer, sequence_length)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}, line {record.line}: {error}") from error

    ends = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    dataset = TokenDataset(examples(), sequence_length, ends)
    if dataset.loss_tokens == 0:
        why = "raise the sequence length" if dataset.truncated else "all of its texts or answers are empty"
        raise ValueError(
            f"no example of {os.fspath(path)} has a token that carries loss within {sequence_length} tokens (the "
            f"longest has {dataset.longest}); {why}"
        )
    return dataset


def _encode(record: Record, tokenizer: Any, sequence_length: int) -> list[tuple[Record, Encoded]]:
    """The record's one example, or one for each answer of a conversation."""
    try:
        return [(record, encode(record, tokenizer, sequence_length))]
    except UnstableTemplate:
        return [(part, encode(part, tokenizer, sequence_length)) for part in record.by_answer()]


def collate(examples: Sequence[Example], pad_id: int) -> Example:
    """A batch of examples, padded on the right to the longest.

    Args:
        examples: B dicts of input_ids and labels, whole numbers [n] each, in tensors, arrays or lists; and of
            attention_mask, where that is not 1 throughout.
        pad_id: the token that fills input_ids.

    Returns:
        input_ids, attention_mask (1 on tokens, 0 on padding) and labels (IGNORE_INDEX on padding), int64 [B, T] each.

    Raises:
        TypeError: what should be whole numbers is something else, naming it.
        ValueError: an example's parts are of different lengths.
    """
    shape = (len(examples), max((len(example["input_ids"]) for example in examples), default=0))
    batch = {
        "input_ids": torch.full(shape, pad_id, device="cpu"),
        "attention_mask": torch.zeros(shape, dtype=torch.int64, device="cpu"),
        "labels": torch.full(shape, IGNORE_INDEX, device="cpu"),
    }
    for row, example in enumerate(examples):
        n = len(example["input_ids"])
        batch["attention_mask"][row, :n] = 1
        for key in example.keys() & batch.keys():
            batch[key][row, :n] = _whole_numbers(example[key], key, n)
    return batch


def _whole_numbers(values: Any, key: str, n: int) -> Tensor:
    numbers = torch.as_tensor(values, device="cpu")
    if numbers.numel() and (numbers.is_floating_point() or numbers.is_complex()):
        raise TypeError(f"{key} of an example must be whole numbers, got {numbers.dtype}")
    if numbers.shape != (n,):
        raise ValueError(
            f"{key} of an example has shape {list(numbers.shape)}, and its input_ids length {n}; each token has its "
            f"own. For others (the class of a text) give the Trainer a loss_fn and a collate_fn"
        )
    return numbers


def order(n: int, seed: int, epoch: int, lengths: Sequence[int] | None = None, global_batch: int = 1) -> list[int]:
    """The order in which an epoch visits n examples: a permutation of 0 .. n-1 that depends on the arguments alone.

    Args:
        n: examples.
        seed, epoch: choose the permutation.
        lengths: tokens of each example. Given, every 16 batches' worth of the permutation is sorted by length and cut
            into batches, which follow one another at random: examples of like length share a batch, which pads least.
        global_batch: examples a batch; used with lengths.

    Raises:
        ValueError: n or global_batch is not above 0, epoch is below 0, or there are not n lengths.
    """
    if n <= 0 or epoch < 0 or global_batch <= 0:
        raise ValueError(
            f"n and global_batch must be above 0 and epoch at least 0, got n={n}, global_batch={global_batch} and "
            f"epoch={epoch}"
        )
    if lengths is not None and len(lengths) != n:
        raise ValueError(f"there are {len(lengths)} lengths for {n} examples")
    return _part_of_epoch(n, seed, epoch, lengths, global_batch, 0, n)


def step_indices(n: int, seed: int, step: int, global_batch: int, lengths: Sequence[int] | None = None) -> list[int]:
    """The examples of an optimizer step: positions step * global_batch .. (step + 1) * global_batch - 1 of the endless
    row of epochs, each in its `order`. Independent of the world size; a batch may span epochs.

    Args:
        n: examples in the data; may be fewer than global_batch.
        seed: of the order.
        step: from 0.
        global_batch: examples a step, over all ranks and micro-batches.
        lengths: see `order`.

    Raises:
        ValueError: n or global_batch is not above 0, or step is below 0.
    """
    if n <= 0 or global_batch <= 0 or step < 0:
        raise ValueError(
            f"n and global_batch must be above 0 and step at least 0, got n={n}, global_batch={global_batch} and "
            f"step={step}"
        )
    indices: list[int] = []
    start, stop = step * global_batch, (step + 1) * global_batch
    while start < stop:
        epoch, first = divmod(start, n)
        part = _part_of_epoch(n, seed, epoch, lengths, global_batch, first, min(first + stop - start, n))
        indices += part
        start += len(part)
    return indices


WINDOW = 16  # batches' worth of examples that are sorted by length together


def _part_of_epoch(
    n: int, seed: int, epoch: int, lengths: Sequence[int] | None, batch: int, first: int, stop: int
) -> list[int]:
    """Positions first .. stop - 1 of an epoch's order."""
    permutation = _permutation(n, seed, epoch)
    if lengths is None:
        return permutation[first:stop].tolist()
    window = WINDOW * batch
    start = first // window * window
    row: list[int] = []
    for at in range(start, stop, window):  # only the windows that are asked for
        drawn: list[int] = permutation[at : at + window].tolist()
        by_length = sorted(drawn, key=lengths.__getitem__)
        place = {example: i for i, example in enumerate(drawn)}
        whole = len(drawn) // batch * batch  # a short last batch stays last
        batches = [by_length[i : i + batch] for i in range(0, whole, batch)]
        batches.sort(key=lambda examples: place[examples[0]])  # where the permutation put its shortest: at random
        row += [example for examples in batches for example in examples] + by_length[whole:]
    return row[first - start : stop - start]


# Kept, since of ten million examples it takes 0.8 s, at each step; a step may span two epochs.
@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """int64 [n]."""
    # Hashed, since seed + epoch would give (0, 1) the order of (1, 0), and torch's CPU generator keeps 32 bits.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randperm(n, generator=generator, device="cpu")
