"""Conversations, and files of training examples, for the tests that read and encode them."""

import json
from pathlib import Path

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Où? 日本"}
ANSWER = {"role": "assistant", "content": "Là-bas 🙂 日"}


def write_jsonl(path: Path, *lines: object, encoding: str = "utf-8") -> Path:
    """A file with these lines; what is not a string is written as JSON."""
    text = "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)
    path.write_bytes(text.encode(encoding))
    return path
