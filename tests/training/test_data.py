"""Data: what a file of records becomes, the batches made of it, and the order of the examples."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phicore.training import data
from phicore.training.batches import make_batch
from phicore.training.data import collate, load_dataset, order, step_indices
from phicore.training.encoding import IGNORE_INDEX, Encoded, encode, prompt_and_reference
from phicore.training.records import read_records
from tests.chat_data import ANSWER, ASK, SYSTEM, write_jsonl
from tests.chat_tokenizers import LONG, chat_tokenizer, tokenizer_of


def test_dataset_counts_and_reports(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl",
        {"text": "abc", "id": 1},  # 4 tokens with eos, of which 3 are predicted
        {"prompt": "abc", "completion": "defg", "source": "x", "id": 2},  # 8 tokens, cut to 5: 2 with loss
        {"prompt": "abcdefgh", "completion": "i"},  # 10 tokens, cut to 5: none with loss
        {"prompt": "abc ", "completion": "d"},  # 5 tokens; " d" is one of them, so that eos alone carries loss
    )
    dataset = load_dataset(path, chat_tokenizer(merges=[("Ġ", "d")]), sequence_length=5)
    assert len(dataset) == 4
    assert [record.line for record in dataset.records] == [1, 2, 3, 4]
    assert (dataset.truncated, dataset.without_loss, dataset.straddling) == (2, 1, 1)
    assert (dataset.tokens, dataset.loss_tokens) == (4 + 5 + 5 + 5, 3 + 2 + 0 + 1)
    assert dataset.tokens == sum(len(example["input_ids"]) for example in dataset)
    assert dataset.loss_tokens == sum(int((example["labels"][1:] != IGNORE_INDEX).sum()) for example in dataset)
    assert dataset.report() == (
        "2 of 4 examples are longer than 5 tokens and were cut (the longest has 10). "
        "1 of 4 examples are left with no token to learn. "
        "In 1 of 4 examples one token spans the end of the prompt and the start of the answer and is not learnt; "
        "move the space between the two from the prompt to the answer. "
        "Keys that are not used were ignored: id, source."
    )


def thoughtful_tokenizer() -> Any:
    """Its template writes thoughts as Qwen3's does: only behind the last question, and there where there is none."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set thought, _, said = m.content.rpartition('</think>') %}"
        "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ (thought or '<think>') + '</think>' }}{% endif %}"
        "{{ said + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def test_a_conversation_is_taken_apart_where_its_template_needs_that(tmp_path: Path) -> None:
    """Each answer is learnt as it stands while it is the last, behind what the model sees when it is to write it."""
    tokenizer = thoughtful_tokenizer()
    thought = {"role": "assistant", "content": "<think>so</think>Then."}
    conversation = [SYSTEM, ASK, ANSWER, ASK, thought, ASK, ANSWER, ASK]
    path = write_jsonl(tmp_path / "data.jsonl", {"messages": [ASK, ANSWER]}, {"messages": conversation}, {"text": "a"})
    dataset = load_dataset(path, tokenizer, LONG)
    assert [(record.line, record.only_last) for record in dataset.records] == [
        (1, False), (2, True), (2, True), (2, True), (3, False),
    ]  # fmt: skip
    assert dataset.report() == (
        "The chat template renders an answer otherwise once more turns follow it, so conversations were taken apart, "
        "an example for each answer (1 into 3)."
    )
    answers = f"<think></think>{ANSWER['content']}", thought["content"], f"<think></think>{ANSWER['content']}"
    for end, example, answer, record in zip((2, 4, 6), dataset[1:4], answers, dataset.records[1:4], strict=True):
        prompt = tokenizer.apply_chat_template(conversation[:end], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert example["input_ids"][: len(ids)].tolist() == ids
        assert example["labels"][: len(ids)].unique().tolist() == [IGNORE_INDEX]
        learnt = [label for label in example["labels"].tolist() if label != IGNORE_INDEX]
        assert tokenizer.decode(learnt) == f"{answer}<|im_end|>"
        assert prompt_and_reference(record, tokenizer) == (prompt, answer)


def test_a_file_is_never_whole_in_lists_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take four times the memory of the tensors that they become."""

    class Tokens(list[int]):
        """A list that can be counted."""

        __hash__ = object.__hash__

    alive: weakref.WeakSet[Tokens] = weakref.WeakSet()
    most = 0

    def counted(*arguments: Any) -> Encoded:
        nonlocal most
        encoded = encode(*arguments)
        tokens = Tokens(encoded.input_ids)
        alive.add(tokens)
        most = max(most, len(alive))
        return replace(encoded, input_ids=tokens)

    monkeypatch.setattr(data, "encode", counted)
    path = write_jsonl(tmp_path / "data.jsonl", *({"text": "a" * (i + 1)} for i in range(9)))
    assert len(load_dataset(path, tokenizer_of(), LONG)) == 9
    assert most <= 2


@pytest.mark.parametrize(("end", "told"), [("", True), ("<|im_end|>", False), ("<|endoftext|>\n", False)])
def test_answers_that_end_in_no_special_token_are_told(end: str, told: bool, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"messages": [ASK, ANSWER]}, {"text": "a"})
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}" + end + "{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    report = load_dataset(path, tokenizer, LONG).report()
    assert (report is not None) == told
    if report is not None:
        assert "In 1 of 2 examples the answer ends without a special token, so the model does not learn to" in report


def test_messages_that_the_template_leaves_out_are_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"messages": [SYSTEM, ASK, ANSWER]}, {"messages": [ASK, ANSWER]})
    tokenizer = chat_tokenizer("phi3")
    assert load_dataset(path, tokenizer, LONG).report() is None
    tokenizer.chat_template = str(tokenizer.chat_template).replace("'system'", "'none'")  # as Phi-3's first one
    report = load_dataset(path, tokenizer, LONG).report()
    assert report is not None
    assert report.startswith("In 1 of 2 examples the chat template leaves out or rewrites what a system or user")


def test_what_a_tokenizer_takes_for_too_long_is_none_of_its_business(tmp_path: Path) -> None:
    """It would tell of indexing errors to come, where examples are cut to the sequence length."""
    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = 2
    with mock.patch("transformers.tokenization_utils_base.logger.warning") as told:
        load_dataset(write_jsonl(tmp_path / "data.jsonl", {"text": "abcdef"}), tokenizer, 3)
    told.assert_not_called()


def test_dataset_items_are_tensors_and_slices_lists(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", *({"text": "abc"[: i + 1]} for i in range(3)))
    tokenizer = tokenizer_of()
    dataset = load_dataset(path, tokenizer, LONG)
    assert dataset.report() is None
    for example, record in zip(dataset, read_records(path), strict=True):
        encoded = encode(record, tokenizer, LONG)
        assert example["input_ids"].dtype == example["labels"].dtype == torch.int64
        assert example["input_ids"].tolist() == encoded.input_ids
        assert example["labels"].tolist() == encoded.labels
    assert [len(example["labels"]) for example in dataset[1:]] == [3, 4]
    assert len(dataset[-1]["labels"]) == 4
    limited = load_dataset(path, tokenizer, LONG, limit=2)
    assert len(limited) == len(limited.records) == 2
    assert len(load_dataset(path, tokenizer, LONG, limit=9)) == 3


@pytest.mark.parametrize("wrong", [0, -1])
def test_sequence_length_and_limit_must_be_positive(tmp_path: Path, wrong: int) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"text": "a"})
    with pytest.raises(ValueError, match=f"limit must be above 0, or None for all records, got {wrong}"):
        load_dataset(path, tokenizer_of(), LONG, limit=wrong)
    with pytest.raises(ValueError, match=f"sequence_length must be above 0, got {wrong}"):
        load_dataset(path, tokenizer_of(), wrong)


def test_a_dataset_without_any_loss_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"messages": [ASK, ANSWER]}, {"prompt": "abcdef", "completion": "g"})
    with pytest.raises(ValueError, match=r"no example of .*data\.jsonl has a token .* within 6 .*raise the sequence"):
        load_dataset(path, tokenizer_of(), sequence_length=6)
    write_jsonl(path, {"text": ""}, {"prompt": "", "completion": ""})
    with pytest.raises(ValueError, match="all of its texts or answers are empty"):
        load_dataset(path, tokenizer_of(), sequence_length=6)


def test_an_example_that_does_not_encode_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", {"text": "a"}, "", {"messages": [ASK, ANSWER]})
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: the tokenizer has no chat template"):
        load_dataset(path, tokenizer, LONG)


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=4), st.integers(0, 99))
def test_collate_pads_on_the_right(rows: list[list[int]], pad_id: int) -> None:
    examples = [
        {"input_ids": torch.tensor(row, dtype=torch.int64), "labels": -torch.tensor(row).long()} for row in rows
    ]
    batch = collate(examples, pad_id)
    width = max(map(len, rows), default=0)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, (len(rows), width))
    )
    for i, row in enumerate(rows):
        pad = width - len(row)
        assert batch["input_ids"][i].tolist() == row + [pad_id] * pad
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * pad
        assert batch["labels"][i].tolist() == [-token for token in row] + [IGNORE_INDEX] * pad


# ===== Order =====

seeds = st.integers(-(2**40), 2**40)


@given(st.integers(1, 50), seeds, st.integers(0, 100))
def test_an_epoch_visits_each_example_once_and_depends_on_its_arguments(n: int, seed: int, epoch: int) -> None:
    first = order(n, seed, epoch)
    assert sorted(first) == list(range(n))
    torch.manual_seed(n)
    torch.randperm(7)
    assert order(n, seed, epoch) == first


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(order(40, seed, epoch)) for seed in (*range(8), 2**32, -1) for epoch in range(8)}
    assert len(orders) == 10 * 8


def test_a_fresh_process_draws_the_same_order_and_needs_no_transformers() -> None:
    """A resumed run must see the data that the first would have seen."""
    program = (
        "import json, sys; from phicore.training.data import order;"
        "print(json.dumps([order(9, 3, 1), 'transformers' in sys.modules or 'tokenizers' in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [order(9, 3, 1), False]


@given(st.integers(1, 12), seeds, st.integers(1, 30), st.integers(0, 20))
def test_steps_walk_the_endless_row_of_epochs(n: int, seed: int, global_batch: int, step: int) -> None:
    stop = (step + 1) * global_batch
    row = [index for epoch in range(stop // n + 1) for index in order(n, seed, epoch)]
    assert step_indices(n, seed, step, global_batch) == row[step * global_batch : stop]
    torch.manual_seed(step)
    assert step_indices(n, seed, step, global_batch) == row[step * global_batch : stop]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=90), seeds, st.integers(1, 4), st.integers(0, 2))
def test_grouping_by_length_permutes_within_windows_and_keeps_like_with_like(
    lengths: list[int], seed: int, batch: int, epoch: int
) -> None:
    n, window = len(lengths), 16 * batch
    grouped, plain = order(n, seed, epoch, lengths, batch), order(n, seed, epoch)
    for start in range(0, n, window):
        part = grouped[start : start + window]
        assert sorted(part) == sorted(plain[start : start + window])
        whole = len(part) // batch * batch
        runs = [sorted(lengths[i] for i in part[k : k + batch]) for k in range(0, whole, batch)]
        runs.sort()
        # A batch's lengths are neighbours in the sorted window: no length of another batch lies strictly within.
        assert all(a[-1] <= b[0] for a, b in pairwise(runs))
    row = [i for e in range(epoch + 2) for i in order(n, seed, e, lengths, batch)]
    for step in range(epoch * n // batch, (epoch + 1) * n // batch):
        assert step_indices(n, seed, step, batch, lengths) == row[step * batch : (step + 1) * batch]


def test_groups_follow_one_another_at_random() -> None:
    lengths = list(range(640))
    steps = [max(lengths[i] for i in step_indices(640, 0, step, 4, lengths)) for step in range(160)]
    rising = sum(a < b for a, b in pairwise(steps))
    assert 50 < rising < 110


def test_order_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    step_indices(5, 0, 3, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_order_refuses_what_it_cannot_do() -> None:
    for n, epoch in ((0, 0), (3, -1)):
        with pytest.raises(ValueError, match="n and global_batch must be above 0 and epoch at least 0"):
            order(n, 0, epoch)
    with pytest.raises(ValueError, match="there are 2 lengths for 3 examples"):
        order(3, 0, 0, [1, 2], 1)
    for n, step, global_batch in ((0, 0, 1), (3, -1, 1), (3, 0, 0)):
        with pytest.raises(ValueError, match="n and global_batch must be above 0 and step at least 0"):
            step_indices(n, 0, step, global_batch)


def test_examples_may_be_lists_and_have_a_mask() -> None:
    """As datasets gives them."""
    lists = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    tensors = [{key: torch.tensor(values) for key, values in example.items()} for example in lists]
    arrays = [{key: numpy.array(values) for key, values in example.items()} for example in lists]
    masked = [example | {"attention_mask": [1] * len(example["labels"])} for example in lists]
    expected = make_batch(tensors)
    for examples in (lists, arrays, masked):
        found = make_batch(examples)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert {t.dtype for t in found.values()} == {torch.int64}
    hidden = make_batch(
        [{"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [0, 1]}, lists[1] | {"attention_mask": [1]}]
    )
    assert hidden["attention_mask"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (
            {"input_ids": [1.5, 2.0], "labels": [1, 2]},
            TypeError,
            "input_ids of an example must be whole numbers, got torch.float32",
        ),
        (
            {"input_ids": [1, 2], "labels": [1]},
            ValueError,
            r"labels of an example has shape \[1\], and its input_ids length 2; each token has its own",
        ),
        (
            {"input_ids": [1, 2], "labels": 1},
            ValueError,
            r"labels of an example has shape \[\], .* give the Trainer a loss_fn and a collate_fn",
        ),
    ],
)
def test_examples_that_are_no_tokens_are_named(example: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_batch([example])


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: (shuffled.append(n), randperm(n, **options))[1])
    visited = [i for step in range(10) for i in step_indices(20, 12345, step, 3)]  # an epoch and a half
    assert shuffled == [20, 20]
    assert visited == (order(20, 12345, 0) + order(20, 12345, 1))[:30]
