"""Records: the three shapes of a line, and each broken line, named with its place and what is wrong."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.training.records import Record, read_records
from tests.chat_data import ANSWER, ASK, SYSTEM, write_jsonl


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_reads_the_three_shapes_with_and_without_bom(tmp_path: Path, encoding: str) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl",
        {"messages": [ASK, ANSWER]},
        "",
        {"prompt": "p", "completion": "日"},
        "  \t",
        {"text": "t\u2028u"},  # U+2028 ends no line of JSONL
        encoding=encoding,
    )
    assert read_records(path) == [
        Record(1, messages=[ASK, ANSWER]),
        Record(3, prompt="p", completion="日"),
        Record(5, text="t\u2028u"),
    ]
    assert read_records(str(path)) == read_records(path)


def test_reads_windows_line_ends_and_a_last_line_without_one(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}')
    assert read_records(path) == [Record(1, text="a"), Record(3, text="b")]


def test_extra_keys_are_kept_by_name(tmp_path: Path) -> None:
    first, second = {**ASK, "name": "x"}, {**ANSWER, "weight": 1, "name": "y"}
    path = write_jsonl(tmp_path / "data.jsonl", {"id": 1, "messages": [first, second], "source": None}, {"text": "a"})
    records = read_records(path)
    assert records[0].messages == [ASK, ANSWER]
    assert records[0].extra == ("id", "source", "messages[].name", "messages[].weight")
    assert records[1].extra == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "invalid JSON .*delimiter at column 13"),
        ("{'text': 1}", "invalid JSON .*at column 2.*one whole JSON object"),
        ('{"text": "a"} {"text": "b"}', "invalid JSON .Extra data"),
        ("[" * 100_000, "invalid JSON"),
        ('{"text": "a", "text": "b"}', "'text' stands twice in one object; keep one of them"),
        ('{"messages": [{"role": "user", "content": "q", "role": "system"}]}', "'role' stands twice"),
        ([{"text": "a"}], "a JSON array, not an object"),
        ("null", "a JSON null, not an object"),
        ("1", "a JSON number, not an object"),
        ({}, "has the keys none; an object needs"),
        ({"instruction": "a", "output": "b"}, "has the keys 'instruction', 'output'; an object needs"),
        ({"text": "a", "messages": [ASK, ANSWER]}, "'messages' and 'text', two shapes at once"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "two shapes at once"),
        ({"prompt": "a"}, 'has "prompt" without "completion"'),
        ({"completion": "a"}, 'has "completion" without "prompt"'),
        ({"text": 1}, '"text" is a JSON number; it must be a string'),
        ({"text": True}, '"text" is a JSON boolean'),
        ({"prompt": "a", "completion": None}, '"completion" is a JSON null; it must be a string'),
        ({"prompt": [ASK], "completion": "b"}, '"prompt" is a JSON array; it must be a string'),
        (r'{"text": "\ud83d"}', '"text" holds half a surrogate pair'),
        ({"messages": "hi"}, '"messages" is a JSON string; it must be an array'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": ["hi"]}, r"messages\[0\] is a JSON string; it must be an object"),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            r"""messages\[0\] has no "role" \(it has 'from', 'value'\)""",
        ),
        ({"messages": [ASK, {"role": "assistant"}]}, r'messages\[1\] has no "content"'),
        (
            {"messages": [ASK, {"role": "tool", "content": "x"}]},
            r"messages\[1\] has the unknown role 'tool'.*assistant",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, r'the "content" of messages\[1\] is a JSON null'),
        ({"messages": [SYSTEM, ASK]}, "no message is the assistant's"),
        ({"messages": [ANSWER, ASK]}, r"messages\[0\] is the assistant's"),
    ],
)
def test_a_broken_line_is_named_with_what_is_wrong(tmp_path: Path, line: object, message: str) -> None:
    path = write_jsonl(tmp_path / "broken.jsonl", {"text": "good"}, "", line)
    with pytest.raises(ValueError, match=rf"broken\.jsonl, line 3: .*{message}"):
        read_records(path)


def test_invalid_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + '{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2: not UTF-8 \(byte 0xe9\); save the file as UTF-8"):
        read_records(path)
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1: not UTF-8 .*not compressed"):
        read_records(path)
    write_jsonl(path, {"text": "a"}, encoding="utf-16")
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1: not UTF-8"):
        read_records(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_records(tmp_path / "nowhere.jsonl")
    for content in (b"", b"\xef\xbb\xbf", b"\n  \n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
            read_records(tmp_path / "empty.jsonl")


@given(st.lists(st.one_of(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), st.just(b'{"text": "a"}'))))
def test_any_bytes_are_records_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    good = [i + 1 for i, line in enumerate(lines) if line == b'{"text": "a"}']
    if good and all(not line.strip() for line in lines if line != b'{"text": "a"}'):
        assert [record.line for record in read_records(path)] == good
    else:
        with pytest.raises(ValueError, match=r"any\.jsonl"):
            read_records(path)
