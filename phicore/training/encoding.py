"""Turning a record into tokens, and saying which of them carry loss.

Tokenizers come in as arguments (a fast tokenizer of transformers); nothing here imports transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phicore.training.records import Record

IGNORE_INDEX = -100
"""The label of a token that carries no loss; what torch's cross entropy ignores by default."""


class UnstableTemplate(ValueError):
    """A chat template renders an answer otherwise once more turns follow it, so that there is no one text in which all
    answers of a conversation stand as the model is to write them. `Record.by_answer` makes a text for each."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one record, cut to the sequence length. labels[i] is input_ids[i] or IGNORE_INDEX."""

    input_ids: list[int]
    labels: list[int]

    length: int
    """How many tokens there were before the cut."""

    straddles: bool = False
    """Whether a token spans the end of a prompt and the start of what follows: such a token carries no loss."""

    left_out: bool = False
    """Whether the chat template does not render what a system or user message says."""

    @property
    def truncated(self) -> bool:
        return self.length > len(self.input_ids)


def encode(record: Record, tokenizer: Any, sequence_length: int) -> Encoded:
    """Tokens and labels of a record, cut to sequence_length.

    messages: rendered by the chat template and tokenised as one text. The assistant's tokens carry loss in each of its
    turns (of a record that is only_last, in the last message): its content and what the template ends a turn with (not
    the whitespace after that). prompt and completion: joined without a template, with the special tokens that the
    tokenizer puts before a text (unless it begins with bos) and eos after it; the completion and eos carry loss. text:
    the same, and every token carries loss.

    Args:
        record: what read_records gives.
        tokenizer: a fast tokenizer of transformers; with a chat template, for messages.
        sequence_length: tokens to keep.

    Raises:
        ValueError: sequence_length is not above 0; the tokenizer is not fast, or lacks a chat template or an eos token
            that the record needs; the template refuses the messages.
        UnstableTemplate: it renders a turn otherwise as the conversation goes on.
    """
    check_sequence_length(sequence_length)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, and only these tell which characters a token covers; "
            f"load one with AutoTokenizer.from_pretrained(..., use_fast=True) from a model that has a tokenizer.json"
        )
    straddles = left_out = False
    if record.messages is not None:
        ids, labels, straddles, left_out = _encode_messages(record.messages, tokenizer, record.only_last)
    elif record.text is not None:
        ids, _ = _tokenize(tokenizer, record.text, add_special_tokens=True)
        labels = list(ids)
        _append_eos(tokenizer, ids, labels)
    else:
        prompt, completion = record.prompt or "", record.completion or ""
        text = prompt + completion
        ids, offsets = _tokenize(tokenizer, text, add_special_tokens=True)
        learnt = _inside(offsets, len(prompt), len(text))
        labels = _labels(ids, learnt)
        straddles = _straddles(offsets, len(prompt), text)
        _append_eos(tokenizer, ids, labels)
    return Encoded(ids[:sequence_length], labels[:sequence_length], len(ids), straddles, left_out)


def prompt_and_reference(record: Record, tokenizer: Any) -> tuple[str, str]:
    """What to generate from, and what the model should then write.

    Returns:
        For messages: the conversation up to the last assistant turn, rendered with the generation prompt (tokenise it
        with add_special_tokens=False, as encode does), and that turn as the template writes it (Qwen3's puts an empty
        thought before the content), without special tokens, stripped. For prompt and completion: the two strings as
        they are (tokenised with the tokenizer's own special tokens).

    Raises:
        ValueError: a text record, which has no prompt; a tokenizer without a chat template.
    """
    if record.messages is not None:
        last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        prompt = render(tokenizer, record.messages[:last], add_generation_prompt=True)
        whole = render(tokenizer, record.messages[: last + 1], add_generation_prompt=False)
        ids = tokenizer(whole.removeprefix(prompt), add_special_tokens=False, verbose=False)["input_ids"]
        return prompt, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    if record.prompt is not None and record.completion is not None:
        return record.prompt, record.completion
    raise ValueError(
        f'line {record.line} holds "text", which has no prompt to generate from; evaluate on records with "messages", '
        f'or "prompt" and "completion"'
    )


def _encode_messages(
    messages: list[dict[str, str]], tokenizer: Any, only_last: bool
) -> tuple[list[int], list[int], bool, bool]:
    """input_ids, labels, whether a token straddles the start of a turn, and whether a message is left out."""
    text = render(tokenizer, messages, add_generation_prompt=False)
    ids, offsets = _tokenize(tokenizer, text, add_special_tokens=False)
    learnt: list[int] = []
    straddles = False
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or (only_last and i < len(messages) - 1):
            continue
        start, end = _turn_span(tokenizer, messages, i, text)
        turn = _inside(offsets, start, end)
        # The whitespace after the end-of-turn token is the template's. It is dropped by whole tokens: Phi-3's <|end|>
        # takes in the newline behind it, and must stay.
        while turn and text[slice(*offsets[turn[-1]])].isspace():
            turn.pop()
        if not turn:
            raise _unstable(f"messages[{i}], the assistant's, has no token of its own in the rendered text")
        learnt += turn
        straddles = straddles or _straddles(offsets, start, text)
    left_out = any(m["role"] != "assistant" and m["content"].strip() not in text for m in messages)
    return ids, _labels(ids, learnt), straddles, left_out


def _turn_span(tokenizer: Any, messages: list[dict[str, str]], i: int, text: str) -> tuple[int, int]:
    """Where the assistant's turn i lies in the rendered text: from behind the generation prompt to where the next turn
    begins. The end may reach a few characters into the next turn's first token, if a template closes every text with
    a token that begins like it."""
    prefix = render(tokenizer, messages[:i], add_generation_prompt=True)
    if not text.startswith(prefix):
        raise _unstable(f"the text before messages[{i}] is not how the whole conversation begins")
    closed = render(tokenizer, messages[: i + 1], add_generation_prompt=False)
    if not text.startswith(closed):  # GPT-OSS's template: <|return|> ends the last turn, <|end|> the others
        goes_on = _before_generation_prompt(tokenizer, messages, i)
        if goes_on is not None and text.startswith(goes_on) and len(goes_on) > len(prefix):
            closed = goes_on
    eos = getattr(tokenizer, "eos_token", None)
    if eos and not text.startswith(closed):  # Phi-3's template: eos comes only after the last turn
        closed = closed.removesuffix(eos)
    if text.startswith(closed):
        return len(prefix), len(closed)
    end = next((k for k, (a, b) in enumerate(zip(closed, text, strict=False)) if a != b), len(text))
    if messages[i]["content"].strip() not in text[len(prefix) : end]:
        raise _unstable(f"messages[{i}] is rendered otherwise once more turns follow it")
    return len(prefix), end


def _before_generation_prompt(tokenizer: Any, messages: list[dict[str, str]], i: int) -> str | None:
    """The conversation through the assistant's turn i, closed as it is where another turn follows. None where the
    template does not let its generation prompt be taken off exactly."""
    asked = next((k for k in range(i, 0, -1) if messages[k - 1]["role"] != "assistant"), None)
    if asked is None:
        return None
    try:
        question = render(tokenizer, messages[:asked], add_generation_prompt=False)
        prompted = render(tokenizer, messages[:asked], add_generation_prompt=True)
        goes_on = render(tokenizer, messages[: i + 1], add_generation_prompt=True)
    except ValueError:  # a template may refuse a conversation that ends so
        return None
    generation_prompt = prompted.removeprefix(question)
    exact = prompted.startswith(question) and goes_on.endswith(generation_prompt)
    return goes_on.removesuffix(generation_prompt) if exact else None


def render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """The text that the chat template makes of messages.

    Raises:
        ValueError: there is no chat template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            'the tokenizer has no chat template, which "messages" need; use an instruction-tuned model\'s tokenizer, '
            'set tokenizer.chat_template, or write the data as "prompt" and "completion"'
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # templates refuse by jinja2.TemplateError, and jinja2 is no dependency of this file
        roles = ", ".join(message["role"] for message in messages)
        where = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise ValueError(f"the chat template of {where} refuses messages with the roles {roles}: {error}") from error


def _unstable(what: str) -> UnstableTemplate:
    return UnstableTemplate(
        f"the chat template is not prefix-stable: {what}, so the assistant's tokens cannot be told apart; set "
        f"tokenizer.chat_template to one that renders a turn the same whatever follows, or write the data as prompt "
        f"and completion"
    )


def _tokenize(tokenizer: Any, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the characters [start, end) that each covers. Special tokens that the tokenizer puts before the
    text cover none; those that it puts after it (T5's </s>) are left out, since the end is set here."""
    encoding = tokenizer(
        text,
        add_special_tokens=add_special_tokens and not begins_with_bos(tokenizer, text),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,  # of its model_max_length: what is too long is cut here
    )
    ids, offsets = list(encoding["input_ids"]), [(a, b) for a, b in encoding["offset_mapping"]]
    added = list(encoding["special_tokens_mask"])
    n = len(ids)
    while n and added[n - 1]:
        n -= 1
    return ids[:n], _with_whitespace(offsets[:n], text)


def begins_with_bos(tokenizer: Any, text: str) -> bool:
    """Whether a text brings its own bos, as one that was rendered for a chat elsewhere: a second would be new to the
    model."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _with_whitespace(offsets: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """The offsets, where a token of nothing but whitespace covers it. Tokenizers that trim offsets (trim_offsets of
    ByteLevel) say that it covers nothing, and stands behind it."""
    ends = [0, *(b for _, b in offsets)]
    return [
        (before, b) if a == b and text[before:b].isspace() else (a, b)
        for before, (a, b) in zip(ends, offsets, strict=False)
    ]


def _append_eos(tokenizer: Any, ids: list[int], labels: list[int]) -> None:
    """Adds eos, with loss, unless the text already ends in one that carries loss."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        raise ValueError(
            "the tokenizer has no eos token, so the model could not learn where a text ends; set tokenizer.eos_token"
        )
    if not ids or labels[-1] != eos:
        ids.append(eos)
        labels.append(eos)


def _inside(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """The positions of the tokens that cover characters of [start, end) and no others. The byte tokens of one
    character all cover that character."""
    return [k for k, (a, b) in enumerate(offsets) if start <= a < b <= end]


def _straddles(offsets: Sequence[tuple[int, int]], start: int, text: str) -> bool:
    """Whether a token begins before start and holds more than whitespace after it."""
    return any(a < start < b and bool(text[start:b].strip()) for a, b in offsets)


def _labels(ids: Sequence[int], learnt: Sequence[int]) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    for k in learnt:
        labels[k] = ids[k]
    return labels


def check_sequence_length(sequence_length: int) -> None:
    if sequence_length <= 0:
        raise ValueError(f"sequence_length must be above 0, got {sequence_length}")
