"""Reading JSONL files of training examples: one conversation, prompt and completion, or text a line."""

import json
import os
from dataclasses import dataclass, replace
from typing import Any

ROLES = ("system", "user", "assistant")
SHAPE_KEYS = ("messages", "prompt", "completion", "text")
ACCEPTED = '"messages", or "prompt" and "completion", or "text"'


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a file, in one of three shapes; the fields of the other two are None."""

    line: int
    """Its line number in the file, from 1."""

    messages: list[dict[str, str]] | None = None
    """A conversation: {"role": one of ROLES, "content": text} each."""

    prompt: str | None = None
    """Text that a completion follows, without a chat template."""

    completion: str | None = None
    """What follows the prompt."""

    text: str | None = None
    """Plain text."""

    extra: tuple[str, ...] = ()
    """Names of the line's keys that are not used, as "id" or "messages[].name"."""

    only_last: bool = False
    """Whether the last of the messages alone is to be learnt, and the answers before it are as given."""

    def by_answer(self) -> "list[Record]":
        """A conversation as one record for each of its answers, with what stands before it."""
        messages = self.messages or []
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
        return [replace(self, messages=messages[:end], only_last=True) for end in ends]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a JSONL file: UTF-8 with or without a BOM, one JSON object a line; blank lines are ignored.

    Args:
        path: a file whose objects hold "messages" (a list of {"role", "content"} with an assistant's among them), or
            "prompt" and "completion" (strings), or "text" (a string). Other keys are allowed; Record.extra names them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is none of this, naming the file, the line and what is wrong; a file without records.
    """
    records = []
    with open(path, "rb") as file:  # bytes, so that a line of invalid UTF-8 can be named
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    records.append(_parse(line, number))
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise ValueError(
                    f"{os.fspath(path)}, line {number}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8, "
                    f"not compressed"
                ) from error
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from error
    if not records:
        raise ValueError(f"{os.fspath(path)} is empty: it holds no record; give one JSON object a line")
    return records


def _parse(line: str, number: int) -> Record:
    """The record that a line holds. Raises ValueError with what is wrong, without the place."""
    try:
        value = json.loads(line.rstrip("\r\n"), object_pairs_hook=_object)  # behind a line's end, its column would be 1
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"invalid JSON ({what}); each line must hold one whole JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {_kind(value)}, not an object; each line must be an object with {ACCEPTED}")
    found = [key for key in SHAPE_KEYS if key in value]
    extra = tuple(key for key in value if key not in SHAPE_KEYS)
    if not found:
        raise ValueError(f"has the keys {', '.join(map(repr, value)) or 'none'}; an object needs {ACCEPTED}")
    if found == ["messages"]:
        messages, extra_in_messages = _parse_messages(value["messages"])
        return Record(number, messages=messages, extra=(*extra, *extra_in_messages))
    if found == ["prompt", "completion"]:
        prompt, completion = (_string(value[key], f'"{key}"') for key in found)
        return Record(number, prompt=prompt, completion=completion, extra=extra)
    if found == ["text"]:
        return Record(number, text=_string(value["text"], '"text"'), extra=extra)
    if len(found) == 1:
        missing = "completion" if found == ["prompt"] else "prompt"
        raise ValueError(f'has "{found[0]}" without "{missing}"; give both, or "text" alone')
    raise ValueError(f"has {' and '.join(map(repr, found))}, two shapes at once; keep one: {ACCEPTED}")


def _parse_messages(value: Any) -> tuple[list[dict[str, str]], list[str]]:
    """The messages, and the names of their unused keys."""
    if not isinstance(value, list):
        raise ValueError(f'"messages" is a JSON {_kind(value)}; it must be an array of {{"role", "content"}}')
    if not value:
        raise ValueError('"messages" is empty; it must hold a user and an assistant message at least')
    messages = []
    extra: dict[str, None] = {}  # a set that keeps the order
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f'messages[{i}] is a JSON {_kind(message)}; it must be an object {{"role", "content"}}')
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f'messages[{i}] has no "{key}" (it has {", ".join(map(repr, message)) or "no key"})')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"messages[{i}] has the unknown role {role!r}; it must be one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": _string(content, f'the "content" of messages[{i}]')})
        extra.update({f"messages[].{key}": None for key in message if key not in ("role", "content")})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to learn; add an assistant message")
    if messages[0]["role"] == "assistant":
        raise ValueError("messages[0] is the assistant's, with nothing that it answers; put a user message before it")
    return messages, list(extra)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of two equal keys, json by itself takes the last without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{max(keys, key=keys.count)!r} stands twice in one object; keep one of them")
    return value


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is a JSON {_kind(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair, no tokenizer takes it
        raise ValueError(
            f"{what} holds half a surrogate pair (a broken \\ud83d-like escape); write the whole character"
        ) from error
    return value


def _kind(value: Any) -> str:
    """JSON's name for the type of a value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
