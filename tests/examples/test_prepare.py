"""The demo's preparation: the examples it writes, and that failing or being stopped leaves nothing half.

The downloads themselves run in `make finetune` and `make test`; here the archives are small ones made by hand.
"""

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "addresses" / "prepare.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_addresses", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


prepare = load_script()

XML = b"""<?xml version="1.0"?>
<AddressCollection>
  <AddressString><AddressNumber>12</AddressNumber> <StreetName>Mt</StreetName> <StreetName>Hill,</StreetName></AddressString>
  <AddressString><AddressNumber>12</AddressNumber> <StreetName>Mt</StreetName> <StreetName>Hill,</StreetName></AddressString>
  <AddressString><Recipient>caf\xc3\xa9</Recipient> <AddressNumber>12</AddressNumber> <Recipient>&amp;\n  co</Recipient><NotAddress> </NotAddress></AddressString>
</AddressCollection>
"""  # noqa: E501
HILL = (("12", "AddressNumber"), ("Mt", "StreetName"), ("Hill,", "StreetName"))
CAFE = (("café", "Recipient"), ("12", "AddressNumber"), ("& co", "Recipient"))


# ===== the examples =====


def test_addresses_are_read_with_their_tags_and_without_line_breaks() -> None:
    assert prepare.parse_addresses(io.BytesIO(XML)) == [HILL, HILL, CAFE]


def test_neighbours_of_one_tag_are_one_span() -> None:
    assert prepare.spans(HILL) == [("12", "AddressNumber"), ("Mt Hill,", "StreetName")]
    assert prepare.spans(CAFE) == [("café", "Recipient"), ("12", "AddressNumber"), ("& co", "Recipient")]


def test_a_line_is_a_conversation() -> None:
    assert json.loads(prepare.json_lines([HILL])) == {
        "messages": [
            {"role": "system", "content": "Tag the parts of the address."},
            {"role": "user", "content": "12 Mt Hill,"},
            {"role": "assistant", "content": "12: AddressNumber\nMt Hill,: StreetName"},
        ]
    }
    assert "café" in prepare.json_lines([CAFE])


words = st.sampled_from(["12", "Main", "MAIN", "main,", "St.", "st", "#", " ", "straße", "STRASSE"])
addresses = st.lists(st.tuples(words, st.sampled_from("AB")), min_size=1, max_size=3).map(tuple)


@given(st.lists(addresses, max_size=40), st.integers(0, 20), st.integers(0, 3))
def test_the_split_is_disjoint_and_loses_nothing(given_: list[Any], eval_size: int, seed: int) -> None:
    train, evaluation = prepare.split(given_, eval_size, seed)
    assert len(train) + len(evaluation) == len(set(given_))
    assert set(train) | set(evaluation) == set(given_)
    assert len(evaluation) <= eval_size
    assert not {prepare.normalized(a) for a in train} & {prepare.normalized(a) for a in evaluation}
    assert prepare.split(given_, eval_size, seed) == (train, evaluation)


def test_the_split_is_shuffled_by_its_seed_and_full() -> None:
    many = [((str(i), "A"),) for i in range(100)]
    train, evaluation = prepare.split(many, 20, 0)
    assert (len(train), len(evaluation)) == (80, 20)
    assert evaluation != many[:20]
    assert evaluation != prepare.split(many, 20, 1)[1]


def test_case_punctuation_and_spaces_do_not_tell_addresses_apart() -> None:
    same = [(("12", "A"), ("Main  St.", "B")), (("12 MAIN", "A"), ("st", "A")), (("12,", "A"), ("_main-St#", "A"))]
    assert {prepare.normalized(address) for address in same} == {"12 main st"}
    assert prepare.normalized((("13", "A"), ("Main St", "B"))) != "12 main st"


def test_the_real_data() -> None:
    assert prepare.complete(prepare.DIRECTORY), "run `make demo-data` first (make test does)"
    lines = {
        name: [json.loads(line)["messages"] for line in (prepare.DIRECTORY / name).read_text("utf-8").splitlines()]
        for name in ("train.jsonl", "eval.jsonl")
    }
    assert len(lines["eval.jsonl"]) == 128
    assert len(lines["train.jsonl"]) > 1300
    texts = {
        name: {prepare.normalized(((messages[1]["content"], ""),)) for messages in examples}
        for name, examples in lines.items()
    }
    assert not texts["train.jsonl"] & texts["eval.jsonl"]
    for messages in [*lines["train.jsonl"], *lines["eval.jsonl"]]:
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        answers = [line.rpartition(": ") for line in messages[2]["content"].splitlines()]
        assert " ".join(text for text, _, _ in answers) == messages[1]["content"]
        assert all(tag.isalnum() and text for text, _, tag in answers)


# ===== the whole, with archives made by hand =====


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose downloads/ holds small archives; the sources' checksums are set to theirs."""
    downloads = tmp_path / "addresses" / "downloads"
    downloads.mkdir(parents=True)
    monkeypatch.setattr(prepare, "EVAL_SIZE", 1)
    for name, content in (("GGUF", b"gguf"), ("LABELED", XML)):
        source = getattr(prepare, name)
        path = downloads / source.archive
        if path.suffix == ".whl":
            with zipfile.ZipFile(path, "w") as wheel:
                wheel.writestr(source.member, content)
        else:
            with tarfile.open(path, "w:gz") as sdist:
                info = tarfile.TarInfo(source.member)
                info.size = len(content)
                sdist.addfile(info, io.BytesIO(content))
        made = dataclasses.replace(source, archive_sha256=sha256(path.read_bytes()), member_sha256=sha256(content))
        monkeypatch.setattr(prepare, name, made)
    return downloads.parent


def convert(source: Path, directory: Path, dtype: object) -> None:
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(source.read_bytes() * 2)


@pytest.fixture(autouse=True)
def _no_real_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phicore.formats.huggingface.convert_gguf", convert)

    def no_pip(command: list[str], **_: Any) -> Any:
        raise AssertionError(f"ran {command}")

    monkeypatch.setattr(prepare.subprocess, "run", no_pip)


def visible(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lock", "downloads"}


EVERYTHING = {".complete.json", "SmolLM2-135M-Instruct", "train.jsonl", "eval.jsonl"}


def test_archives_put_by_hand_need_no_network(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.prepare(directory)
    assert visible(directory) == EVERYTHING
    assert (directory / "SmolLM2-135M-Instruct" / "model.safetensors").read_bytes() == b"ggufgguf"
    assert (directory / "eval.jsonl").read_text("utf-8").count("\n") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.endswith(" s") for line in lines)
    prepare.prepare(directory)
    assert capsys.readouterr().out == ""  # all there


@pytest.mark.parametrize("lost", ["train.jsonl", "SmolLM2-135M-Instruct/model.safetensors", ".complete.json"])
def test_what_is_missing_or_cut_is_made_again(directory: Path, lost: str) -> None:
    prepare.prepare(directory)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    (directory / lost).write_bytes((directory / lost).read_bytes()[:-2])
    assert len(prepare.complete(directory)) < 3
    prepare.prepare(directory)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_another_recipe_makes_everything_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare.prepare(directory)
    monkeypatch.setattr(prepare, "RECIPE", prepare.RECIPE | {"seed": 99})
    assert prepare.complete(directory) == set()


def test_a_member_with_another_checksum_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "LABELED", dataclasses.replace(prepare.LABELED, member_sha256="0" * 64))
    with pytest.raises(prepare.PrepareError, match=r"labeled\.xml in .* has sha256 [0-9a-f]{64}, expected 0000"):
        prepare.prepare(directory)
    assert visible(directory) == set()


def run_main(monkeypatch: pytest.MonkeyPatch, directory: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--directory", str(directory)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        return prepare.main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_leaves_what_is_finished(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(source: Path, directory: Path, dtype: object) -> None:
        convert(source, directory, dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr("phicore.formats.huggingface.convert_gguf", interrupted)
    assert run_main(monkeypatch, directory) == 130
    assert visible(directory) == {".complete.json", "train.jsonl", "eval.jsonl"}
    assert "run it again" in capsys.readouterr().err
    monkeypatch.setattr("phicore.formats.huggingface.convert_gguf", convert)
    assert run_main(monkeypatch, directory) == 0
    assert "usaddress" not in capsys.readouterr().out  # that part was done
    assert visible(directory) == EVERYTHING


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_prepare, phicore.formats.huggingface
for name, sums in {sums!r}.items():
    source = getattr(test_prepare.prepare, name)
    setattr(test_prepare.prepare, name, test_prepare.dataclasses.replace(source, **sums))
def convert(source, directory, dtype):
    test_prepare.convert(source, directory, dtype)
    os.kill(os.getpid(), signal.{signal})
phicore.formats.huggingface.convert_gguf = convert
sys.argv = ["prepare.py", "--directory", {directory!r}]
sys.exit(test_prepare.prepare.main())
"""


@pytest.mark.parametrize(("name", "status"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 143)])
def test_a_kill_leaves_nothing_half(directory: Path, name: str, status: int) -> None:
    sums = {
        source: {field: getattr(getattr(prepare, source), field) for field in ("archive_sha256", "member_sha256")}
        for source in ("GGUF", "LABELED")
    }
    code = KILLED.format(tests=str(Path(__file__).parent), sums=sums, directory=str(directory), signal=name)
    popen = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    assert popen.wait(timeout=120) == status
    assert visible(directory) - {".work"} == {".complete.json", "train.jsonl", "eval.jsonl"}
    assert (".work" in visible(directory)) == (name == "SIGKILL")
    prepare.prepare(directory)  # takes away what is left, and does the rest
    assert visible(directory) == EVERYTHING


def test_when_all_is_there_torch_is_not_imported(directory: Path) -> None:
    """It looks before it imports: a second `make` costs a blink."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['prepare.py', '--directory', {str(directory)!r}]\n"
        f"script = runpy.run_path({str(SCRIPT)!r})\n"
        "script['prepare'].__globals__['complete'] = lambda directory: {1, 2, 3}\n"
        "assert script['main']() == 0\n"
        "assert not {'torch', 'transformers', 'phicore'} & set(sys.modules)\n"
    )
    assert subprocess.Popen([sys.executable, "-c", code]).wait(timeout=60) == 0


# ===== failing downloads =====


def run_without_index(directory: Path) -> tuple[int, str, str]:
    """Runs the script with a pip that reaches no index: exit status, stdout, stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # free again below, so that a connection is refused
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    unreachable = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://127.0.0.1:{port}/simple",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }
    command = [sys.executable, str(SCRIPT), "--directory", str(directory)]
    with subprocess.Popen(
        command, env=clean | unreachable, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as popen:
        out, err = popen.communicate(timeout=120)
    return popen.returncode, out, err


def test_a_failed_download_says_what_to_do(tmp_path: Path) -> None:
    status, out, err = run_without_index(tmp_path / "addresses")
    assert status == 1
    assert out.startswith("downloading usaddress==0.5.16 ...")
    assert "could not download usaddress==0.5.16 (usaddress-0.5.16.tar.gz). pip said:" in err
    assert "No matching distribution found" in err
    assert "PIP_INDEX_URL" in err
    assert str(tmp_path / "addresses" / "downloads") in err
    assert "Traceback" not in err
    assert visible(tmp_path / "addresses") == set()


def test_a_damaged_archive_is_named_and_kept(tmp_path: Path) -> None:
    archive = tmp_path / "addresses" / "downloads" / prepare.LABELED.archive
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"not it")
    status, _, err = run_without_index(tmp_path / "addresses")
    assert status == 1
    assert f"{archive} is there, but its sha256 is not {prepare.LABELED.archive_sha256}" in err
    assert archive.read_bytes() == b"not it"
