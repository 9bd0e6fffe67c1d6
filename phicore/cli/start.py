"""What finetune refuses before it loads a model: options, files, and an output that another run holds."""

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phicore import atomic
from phicore.cli import needs
from phicore.nf4.tensor import check_block_size
from phicore.training import distributed
from phicore.training.checkpoint import read_state
from phicore.training.config import TrainConfig
from phicore.training.output import hold_output, prepare_output
from phicore.training.records import Record, read_records
from phicore.training.resume import check_settings
from phicore.training.watch import Watch

if TYPE_CHECKING:
    from phicore.cli.finetune import FinetuneOptions

LAST = ("matplotlib", "rich")  # packages that are first used when training is over


def check_options(options: "FinetuneOptions") -> None:
    """Refuses what can be seen to be wrong without the model and the data.

    Raises:
        ValueError: a number out of its range, or options that exclude or need each other; they are named.
    """
    if options.adapter.init == "loftq" and options.method not in ("qlora", "qdora"):
        raise ValueError(f"--init loftq codes the base to NF4; use --method qlora or qdora, not {options.method}")
    for name, least in (
        ("sequence_length", 1),
        ("eval_limit", 1),
        ("answers", 0),
        ("samples", 0),
        ("max_new_tokens", 1),
        ("threads", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    check_block_size(options.block_size)


def read_data(options: "FinetuneOptions") -> int:
    """Reads the data once for what is wrong with it; how many training examples there are.

    Raises:
        FileNotFoundError: a file is not there, or is no plain file; the option is named.
        ValueError: a line that is no record, naming option, file and line; --eval-every or --answers without
            --eval-data; --answers to records without a prompt.
        ImportError: a package is missing that would be used at the end only.
    """
    for package in LAST:
        if importlib.util.find_spec(package) is None:
            raise ImportError(needs(package))
    for option, value in (("--eval-every", options.train.eval_every), ("--answers", options.answers)):
        if value and not options.eval_data:
            raise ValueError(f"{option} is {value}, but there is no --eval-data for it; give one, or {option} 0")
    examples = len(_read("--data", options.data))
    if options.eval_data:
        held_out = _read("--eval-data", options.eval_data)[: options.eval_limit]
        text = next((record for record in held_out[: options.answers] if record.text is not None), None)
        if text is not None:
            raise ValueError(
                f'--answers is {options.answers}, but {options.eval_data}, line {text.line}, holds "text", which has '
                f'no prompt to answer; give --answers 0, or records with "messages", or "prompt" and "completion"'
            )
    return examples


def _read(option: str, path: str) -> list[Record]:
    if not Path(path).is_file():  # a pipe could be read only once
        what = "not a plain file" if Path(path).exists() else "no such file"
        raise FileNotFoundError(f'{option}: {what}: "{path}"')
    try:
        return read_records(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {error}") from error


def result_directory(method: str) -> str:
    """What a run of this method leaves in its output beside its figures."""
    return "model" if method == "full" else "adapter"


def remove_results(output: Path) -> None:
    """Removes what a run that is overwritten has left: its figures, and its adapter/ or model/."""
    if (name := _result_before(output)) is not None:
        path = output / name
        if path.is_dir() and not path.is_symlink():  # what a link leads to is replaced there
            shutil.rmtree(path)
        for file in ("answers.jsonl", "loss.png", "result.json"):  # the last is what tells of the others
            (output / file).unlink(missing_ok=True)


def _result_before(output: Path) -> str | None:
    """The result_directory of the run that stands in an output, by its result.json; None if there is none."""
    try:
        return result_directory(json.loads((output / "result.json").read_text())["options"]["method"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


@contextmanager
def accepted(train: TrainConfig, settings: Mapping[str, Any], watch: Watch) -> Iterator[None]:
    """Within it no other run can take the output. A run that `Trainer.fit` would refuse there is refused at once, and
    leaves what is there as it is.

    Args:
        train: says which output, and whether to resume or to overwrite; old checkpoints stay until `fit` starts.
        settings: what must be as it was for the run to be resumed.
        watch: of the run.

    Raises:
        FileExistsError, OSError, ValueError: see `Trainer.fit`.
    """
    with ExitStack() as held:
        with watch.during("taking the output"):
            held.callback(hold_output(Path(train.output)))
            distributed.on_first_rank(lambda: _refuse(train, settings))
        yield


def _refuse(train: TrainConfig, settings: Mapping[str, Any]) -> None:
    output, name = Path(train.output), result_directory(settings["method"])
    before = _result_before(output)
    for replaced in {name, before if train.overwrite else None} - {None}:
        atomic.check_apart(output / str(replaced), settings["model"])
    if not (train.resume or train.overwrite or before):
        atomic.check_free(output / name)
    newest = None if train.overwrite else prepare_output(train)
    then = None if newest is None else read_state(newest)["settings"]  # None: another trainer's, which has none
    if newest is not None and then is not None:
        check_settings(newest, then, settings)
