"""The `phicore` command: parse, call, print."""

import importlib
import io
import os
import sys
from collections.abc import Sequence

from phicore.cli import output

COMMANDS = {
    "check": "say what a server (vllm, tgi, llama.cpp, kaito, transformers) would misread of an adapter",
    "convert-deepspeed": "write a ZeRO-1 or ZeRO-2 checkpoint of DeepSpeed as safetensors, or as a run to go on with",
    "export": "write an adapter that such a server reads rightly, or say what it does not take",
    "finetune": "fine-tune a model on JSONL data with LoRA, DoRA, QLoRA, QDoRA or whole",
    "generate": "answer a prompt with a model and, if given, an adapter",
    "merge": "fold an adapter into a model and write a directory that transformers loads",
    "plan": "say what memory, disk and traffic a run of finetune will take, without its weights or a step",
    "quantize": "write a model's linear layers in NF4, in bitsandbytes' layout",
}
PACKAGES = ("tyro", "tqdm", "rich", "yaml", "matplotlib", "tomli")  # what the extra "cli" brings, by import name
EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, ImportError, NotImplementedError)


def version_of(package: str) -> str:
    """A package's version, in words where there is none: a checkout of phicore runs without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def needs(package: str) -> str:
    """What to say where a package of the extra "cli" is missing."""
    return f"the commands need {package}, which is not installed; in phicore's checkout: pip install -e '.[cli]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 1 for what the command refused, 2 for arguments it does not take,
    130 after Ctrl-C, 141 where nobody reads its output any more (phicore --help | head -1).

    What a user can mend is told in one line; PHICORE_TRACEBACK=1 shows where it was raised. Standard output may be
    closed, and what its encoding lacks is escaped.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's: an answer may hold any character
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            with output.writing():
                sys.stdout.flush()  # at the interpreter's exit it would be too late to be quiet
    except BrokenPipeError:
        return 141  # as of a program that SIGPIPE ends
    except OSError as error:
        if error.filename != output.NAME or os.environ.get("PHICORE_TRACEBACK"):
            raise
        print(f"phicore: {error}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "--version":
        print(version_of("phicore"))
        return 0
    if command not in COMMANDS:
        print(f'phicore: no command "{command}"\n\n{_usage()}', file=sys.stderr)
        return 2
    try:
        importlib.import_module(f"phicore.cli.{command.replace('-', '_')}").main(rest)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as stop:
        if os.environ.get("PHICORE_TRACEBACK"):
            raise
        print(f"phicore {command}: interrupted; {str(stop) or 'nothing is left half written'}", file=sys.stderr)
        return 130  # as of a program that SIGINT ends
    except Exception as error:
        _tell(command, error)
        return 1
    return 0


def _tell(command: str, error: Exception) -> None:
    """Prints an error in a line; on several ranks, what all raise alike once. Raises what only a traceback explains."""
    from phicore.training.distributed import is_told_here, rank, told_elsewhere, world_size
    from phicore.training.lost import LostRankError

    if not is_told_here(error):
        print(told_elsewhere(error), file=sys.stderr)
        return
    if os.environ.get("PHICORE_TRACEBACK") or not isinstance(error, (*EXPECTED, LostRankError)):
        raise error
    missing = error.name if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES else None
    text = " ".join(str(error).split()) if missing is None else needs(missing)
    own = f"rank {rank()}: " if world_size() > 1 and not hasattr(error, "told_by") else ""
    print(f"phicore {command}: {own}{text}", file=sys.stderr)


def _usage() -> str:
    lines = [f"  {name:<18} {what}" for name, what in COMMANDS.items()]
    usage = ["usage: phicore COMMAND [OPTIONS]   (phicore COMMAND --help lists them)", "       phicore --version", ""]
    return "\n".join([*usage, *lines])
