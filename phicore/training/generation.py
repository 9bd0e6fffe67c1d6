"""Answers of a causal language model of transformers: greedy, in padded batches that shrink as answers end."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phicore.adapters.switch import check_not_mixed
from phicore.formats.huggingface import import_transformers, quiet_transformers
from phicore.modules import unwrap
from phicore.training.batches import chunks
from phicore.training.encoding import begins_with_bos
from phicore.training.modes import mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], object] | None = None,
    *,
    add_special_tokens: bool | Sequence[bool] | None = None,
) -> list[str]:
    """Continues each prompt greedily, until its eos or end-of-turn token or for max_new_tokens.

    Prompts are run in batches of like length, padded on the left; the answers are those that each would get alone, up
    to rounding. Models that count positions by themselves, such as BART's decoder, would count the padding: theirs are
    batches of equal length. The model's sampling settings are not used, and its mode (train or eval) is as before
    afterwards.

    Args:
        model: a causal language model of transformers; its linear layers may be phicore's.
        tokenizer: its own.
        prompts: texts as the model shall read them: for a chat, already rendered by the chat template.
        max_new_tokens: at most so many tokens an answer.
        batch_size: prompts at a time.
        progress: called with (prompts done, prompts in all) after each batch.
        add_special_tokens: whether the tokenizer puts its own before the prompts (bos), or before each of them; not
            before a prompt that begins with bos. None: no if it has a chat template, since that writes them.

    Returns:
        The new text of each prompt, without special tokens, in the order of the prompts.

    Raises:
        ValueError: a prompt that is empty or too long for the model; a size that is not positive; a model without a
            key-value cache; a call within `phicore.adapters.mixed`, whose rows it would put in another order.
    """
    transformers = import_transformers()
    check_not_mixed(model, "generate")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be positive, got {max_new_tokens} and {batch_size}")
    adds = add_special_tokens if isinstance(add_special_tokens, Sequence) else [add_special_tokens] * len(prompts)
    rows = [_encode(tokenizer, prompt, add) for prompt, add in zip(prompts, adds, strict=True)]
    _check_lengths(model, rows, max_new_tokens)
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else 0
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the longest first: what does not fit fails at once
    with _evaluating(transformers, model):
        done = 0
        for batch in _batches(order, [len(row) for row in rows], batch_size, padded=not _counts_positions(model)):
            ids, mask = (t.to(model.device) for t in _left_padded([rows[i] for i in batch], pad))
            cache = transformers.DynamicCache(config=model.config.get_text_config())
            for i, new in zip(batch, _continue(model, ids, mask, cache, stops, max_new_tokens), strict=True):
                text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[i] = str(text)
            done += len(batch)
            if progress is not None:
                progress(done, len(order))
    return answers


def _counts_positions(model: Any) -> bool:
    """Whether a model embeds positions that it is not given."""
    given = "position_ids" in inspect.signature(unwrap(model).forward).parameters
    return not given and any("position" in name for name, _ in model.named_modules())


def _batches(order: list[int], lengths: list[int], size: int, *, padded: bool) -> Iterator[list[int]]:
    """Runs of at most `size`; not padded, of equal length."""
    for _, run in groupby(order, key=lambda i: padded or lengths[i]):
        yield from chunks(list(run), size)


def _continue(
    model: Any, ids: Tensor, mask: Tensor, cache: Any, stops: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """The new tokens of each row, without the token that ends it.

    Rows that have ended leave the batch as soon as they are an eighth of it: most answers are far shorter than the
    longest, and a row that has ended costs as much as one that goes on.

    Args:
        model: in eval mode.
        ids, mask: int64 [B, T], the padding on the left.
        cache: empty.
    """
    bare: Any = unwrap(model)
    accepted = inspect.signature(bare.forward).parameters  # that of a compiled model names none
    if "past_key_values" not in accepted or bare.config.model_type == "recurrent_gemma":  # its layers keep their states
        raise ValueError(
            f"{type(bare).__name__} keeps not all that it knows of earlier tokens in past_key_values; "
            f"use the model's own generate"
        )
    answers: list[list[int]] = [[] for _ in ids]
    going = list(range(len(ids)))  # the answer of each row of the batch
    ended: set[int] = set()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        inputs = {"position_ids": positions, "logits_to_keep": 1}
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{key: value for key, value in inputs.items() if key in accepted},
        ).logits
        tokens = logits[:, -1].argmax(-1)  # [B]
        for answer, token in zip(going, tokens.tolist(), strict=True):
            if token in stops:
                ended.add(answer)
            elif answer not in ended:
                answers[answer].append(token)
        stay = [row for row, answer in enumerate(going) if answer not in ended]
        if not stay:
            break
        if 8 * len(stay) <= 7 * len(going):
            going = [going[row] for row in stay]
            index = torch.tensor(stay, device=ids.device)
            cache.reorder_cache(index)  # and not batch_select_indices, which linear attention lacks
            tokens, mask, positions = tokens[index], mask[index], positions[index]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: eos of the model and the tokenizer, and what the chat template puts after one."""
    found: list[int] = []
    for ids in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
        found += ids if isinstance(ids, list) else [ids] if ids is not None else []
    if wrong := [token for token in found if not isinstance(token, int)]:
        raise ValueError(f"eos_token_id (generation_config.json) must be a token's number or several, got {wrong[0]!r}")
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("answer")[2]
        except Exception:  # a template may refuse such a chat, by an error of jinja2; eos still ends an answer
            after = ""
        special = tokenizer.added_tokens_decoder
        found += [token for token in tokenizer.encode(after, add_special_tokens=False) if token in special][:1]
    return sorted(set(found))


def _encode(tokenizer: Any, prompt: str, add_special_tokens: bool | None) -> list[int]:
    if add_special_tokens is None:
        add_special_tokens = not tokenizer.chat_template
    if not add_special_tokens or begins_with_bos(tokenizer, prompt):
        return list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    encoding = tokenizer(prompt, return_special_tokens_mask=True, verbose=False)
    ids, added = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    while len(ids) > 1 and added[len(ids) - 1]:
        ids.pop()  # a tokenizer that closes every text: nothing comes after its end
    return ids


def positions_of(model: Any) -> int | None:
    """Tokens that a model of transformers can take; None where its configuration sets no limit."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # the latter is MPT's


def _check_lengths(model: Any, rows: list[list[int]], max_new_tokens: int) -> None:
    limit = positions_of(model)
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {number} is empty: there is nothing to continue")
        if limit is not None and len(row) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {number} has {len(row)} tokens, which with max_new_tokens={max_new_tokens} passes the model's "
                f"{limit} positions; shorten the prompt or lower max_new_tokens"
            )


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids -> (ids, mask), each int64 [len(rows), longest], the padding on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@contextmanager
def _evaluating(transformers: Any, model: Any) -> Iterator[None]:
    """Within it, the model is in eval mode and transformers shows no bars."""
    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(_contiguous)
    try:
        with mode(model, training=False), quiet_transformers(transformers, bars=False):
            yield
    finally:
        if handle is not None:
            handle.remove()


def _contiguous(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A head sees the last token of each prompt, [B, 1, in] cut out of [B, T, in]. Of such a strided input and a frozen
    weight in 16 bits torch makes B products on a CPU, and B copies of the weight for them: 3.6 GB for 64 prompts of
    SmolLM2-135M."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)
