"""Options that come from the command line and from a TOML or YAML file, under the same names.

A file's entries become arguments in front of those that were typed, so that both are checked alike and what is typed
wins.
"""

import io
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Idle: TypeAlias = Callable[[T], Iterable[tuple[bool, str, Collection[str]]]]
"""Of options as they are parsed: whether something is so, its words, and the options that then have no effect."""


def parse(options: type[T], arguments: Sequence[str], command: str, description: str, idle: Idle[T] | None = None) -> T:
    """Makes an options dataclass from arguments. `--config FILE` reads a TOML or YAML file first.

    Args:
        options: the dataclass; its fields become options.
        arguments: without the command's name.
        command, description: for what is printed.
        idle: which options have no effect beside the others. They are refused where they were typed, and stay without
            effect where they stand in a file, which may be for several methods.

    Raises:
        SystemExit: with status 2 after saying what is wrong, with status 0 after --help.
    """
    import tyro

    try:
        files, typed = split_config(list(map(_from_home, arguments)))
        given = [_from_home(argument) for file in files for argument in file_arguments(file)] + typed
    except (OSError, ValueError) as error:
        print(f"phicore {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    try:
        parsed = tyro.cli(
            options,
            prog=f"phicore {command}",
            description=f"{description}\n\nEvery option can also stand in a TOML or YAML file, under its name with or "
            "without underscores (learning_rate = 2e-4), that --config FILE names; what is typed wins.",
            args=given,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as stop:
        if stop.code and files:  # tyro names what it does not take, and knows of no file
            print(f"{', '.join(files)} and what was typed: {shlex.join(given)}", file=sys.stderr)
        raise
    if (problem := _typed_in_vain(parsed, typed, idle)) is not None:
        print(f"phicore {command}: {problem}", file=sys.stderr)
        raise SystemExit(2)
    return parsed


def _typed_in_vain(parsed: T, typed: Sequence[str], idle: Idle[T] | None) -> str | None:
    """What of the arguments that were typed has no effect; None if all have one."""
    words = [word.partition("=")[0] for word in typed if word.startswith("--")]
    flags = {_option(word): word for word in words}
    again = [
        flags[name]
        for name, value in _values(parsed)
        if isinstance(value, tuple | dict) and sum(_option(word) == name for word in words) > 1
    ]
    if again:
        return (
            f"{', '.join(again)}: typed more than once, of which the last would replace the others; put all values "
            f"behind one"
        )
    in_vain = [
        f"{', '.join(flags[name] for name in flags if name in names)}: no effect {case}"
        for so, case, names in (idle(parsed) if idle else ())
        if so and not flags.keys().isdisjoint(names)
    ]
    return f"{'; '.join(in_vain)}; leave out what has none" if in_vain else None


def _values(options: Any) -> Iterator[tuple[str, Any]]:
    """Each option and its value, those of the dataclasses within among them."""
    for field in fields(options):
        value = getattr(options, field.name)
        yield from _values(value) if is_dataclass(value) else [(field.name, value)]


def _option(flag: str) -> str:
    """The name of the field that --flag, --no-flag or --flag=value sets."""
    return flag.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")


def parse_everywhere(
    options: type[T],
    arguments: Sequence[str],
    command: str,
    description: str,
    join: Callable[[T | None], object],
    idle: Idle[T] | None = None,
) -> T:
    """`parse` on each of the ranks that the environment asks for (torchrun).

    Args:
        options, arguments, command, description, idle: see `parse`.
        join: makes this process one of the ranks, given the options, or None where they are refused.

    Raises:
        SystemExit: one rank refuses its arguments, on all; what all say alike is said by rank 0 alone.
    """
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return parse(options, arguments, command, description, idle)
    from phicore.training.distributed import rank, together

    said, parsed, refused = io.StringIO(), None, None
    try:
        with redirect_stdout(said), redirect_stderr(said):
            parsed = parse(options, arguments, command, description, idle)
    except SystemExit as stop:
        refused = (stop.code, said.getvalue())
    join(parsed)
    answers = together(lambda: refused)
    if refused is not None and answers != [refused] * len(answers):
        print(f"rank {rank()}: {refused[1]}", file=sys.stderr, flush=True)
    elif refused is not None and rank() == 0:
        print(refused[1], file=sys.stdout if refused[0] == 0 else sys.stderr, flush=True)
    if parsed is None or any(answer is not None for answer in answers):
        raise SystemExit(2 if refused is None else refused[0])
    return parsed


def split_config(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--config FILE` and `--config=FILE` out: (files, the other arguments).

    Raises:
        ValueError: --config without a file.
    """
    files, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            file = next(rest, None)
            if file is None:
                raise ValueError("--config needs the name of a TOML or YAML file")
            files.append(file)
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        else:
            others.append(argument)
    return files, others


def file_arguments(path: str) -> list[str]:
    """The entries of a TOML or YAML file as arguments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a flat TOML or YAML mapping, or one that gives an option twice, naming the file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f'no such config file: "{path}"')
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".toml":
            entries = _toml(text)
        elif file.suffix in (".yaml", ".yml"):
            entries = _yaml(text) or {}
        else:
            raise ValueError("a config file's name must end in .toml, .yaml or .yml")
    except ImportError:  # says nothing of the file
        raise
    except Exception as error:  # yaml.YAMLError and tomllib's errors have no common base but Exception
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: must be a mapping of option names to values, is a {type(entries).__name__}")
    spelled: dict[str, str] = {}
    for key in map(str, entries):
        if (before := spelled.setdefault(key.replace("_", "-"), key)) != key:
            raise ValueError(f"{path}: {before} and {key} are the same option; keep one of them")
    return [argument for key, value in entries.items() for argument in _argument(path, str(key), value)]


def _argument(path: str, key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if value is None:
        return [flag, "None"]
    if isinstance(value, list):
        words = [str(item) for item in value]
        if option := next((word for word in words if word.startswith("--") or word == "-h"), None):
            raise ValueError(
                f'{path}: "{option}" in {key} would be taken for an option; give it by itself, or put a space before it'
            )
        return [flag, *words]
    if isinstance(value, dict):
        if any(isinstance(inner, dict | list) for inner in value.values()):
            raise ValueError(f"{path}: {key} is nested too deep; options are flat")
        return [flag, *(str(part) for item in value.items() for part in item)]
    return [f"{flag}={value}"]  # one word, since a value may begin with "-"


def _from_home(argument: str) -> str:
    """`--option=~/path` with the home directory, which shells put in place of a "~" at the start of a word only."""
    option, equals, value = argument.partition("=")
    return f"{option}={os.path.expanduser(value)}" if equals and option.startswith("--") else argument


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    """As safe_load reads it, which by itself takes the last of two equal keys; TOML refuses them."""
    import yaml

    options: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    parts = [value for _, value in options.value] if isinstance(options, yaml.MappingNode) else []
    for node in (options, *parts):  # options are flat: a mapping below these is refused anyway
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f'"{name}" stands on line {lines[name]} and again on line {line}; keep one of them')
            lines[name] = line
    return yaml.safe_load(text)
