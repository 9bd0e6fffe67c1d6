"""Answers of a causal language model of transformers: greedy, in padded batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phicore.formats.huggingface import import_transformers, quiet_transformers

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
    add_special_tokens: bool | None = None,
) -> list[str]:
    """Continues each prompt greedily, until its eos or end-of-turn token or for max_new_tokens.

    Prompts are run in batches of like length, padded on the left; the answers are those that each would get alone, up
    to rounding. The model's sampling settings are not used, and its mode (train or eval) is as before afterwards.

    Args:
        model: a causal language model of transformers; its linear layers may be phicore's.
        tokenizer: its own.
        prompts: texts as the model shall read them: for a chat, already rendered by the chat template.
        max_new_tokens: at most so many tokens an answer.
        batch_size: prompts at a time.
        progress: called with (prompts done, prompts in all) after each batch.
        add_special_tokens: whether the tokenizer puts its own before the prompts (bos). None: no if it has a chat
            template, since that writes them; otherwise yes, but for a prompt that begins with bos.

    Returns:
        The new text of each prompt, without special tokens, in the order of the prompts.

    Raises:
        ValueError: a prompt that is empty or too long for the model; a size that is not positive.
    """
    transformers = import_transformers()
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be positive, got {max_new_tokens} and {batch_size}")
    rows = [_encode(tokenizer, prompt, add_special_tokens) for prompt in prompts]
    _check_lengths(model, rows, max_new_tokens)
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else 0
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad, use_cache=True
    )
    continue_: Any = model.generate
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the longest first: what does not fit fails at once
    with _generating(transformers, model, settings):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = _left_padded([rows[i] for i in batch], pad)
            output = continue_(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))  # [b, s + new]
            for i, new in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                length = next((n for n, token in enumerate(new) if token in stops), len(new))
                text = tokenizer.decode(new[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[i] = str(text)
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return answers


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: eos of the model and the tokenizer, and what the chat template puts after one."""
    found: list[int] = []
    for ids in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
        found += ids if isinstance(ids, list) else [ids] if ids is not None else []
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("answer")[2]
        except Exception:  # a template may refuse such a chat, by an error of jinja2; eos still ends an answer
            after = ""
        special = tokenizer.added_tokens_decoder
        found += [token for token in tokenizer.encode(after, add_special_tokens=False)[:1] if token in special]
    return sorted(set(found))


def _encode(tokenizer: Any, prompt: str, add_special_tokens: bool | None) -> list[int]:
    if add_special_tokens is None:
        begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        add_special_tokens = not tokenizer.chat_template and not begun
    if not add_special_tokens:
        return list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    encoding = tokenizer(prompt, return_special_tokens_mask=True, verbose=False)
    ids, added = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    while len(ids) > 1 and added[len(ids) - 1]:
        ids.pop()  # a tokenizer that closes every text: nothing comes after its end
    return ids


def _check_lengths(model: Any, rows: list[list[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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
def _generating(transformers: Any, model: Any, settings: Any) -> Iterator[None]:
    """Within it, the model is in eval mode and `settings` alone says how it generates.

    model.generate fills what a given configuration leaves open from the model's own, sampling settings included, so
    the model's own is taken away.
    """
    modes: dict[nn.Module, bool] = {module: module.training for module in model.modules()}
    own = model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        with quiet_transformers(transformers, bars=False):
            yield
    finally:
        model.generation_config = own
        for module, training in modes.items():
            module.training = training
