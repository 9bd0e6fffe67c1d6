"""Lines of code of each component beside the peers', counted over the installed packages.

The rule: a line counts if it holds a token of Python code. Blank lines, comments and docstrings do not.
"""

import ast
import importlib.util
import io
import tokenize
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures
from benchmarks.figures import Figure

# component: (ours, {peer: its files}), as package/file or package/directory
COMPONENTS: dict[str, tuple[Sequence[str], dict[str, Sequence[str]]]] = {
    "LoRA and DoRA layers": (["phicore/adapters", "phicore/modules.py"], {
        "peft, tuners/lora": ["peft/tuners/lora", "peft/tuners/tuners_utils.py"],
    }),
    "NF4": (["phicore/nf4"], {
        "bitsandbytes": ["bitsandbytes"],
    }),
    "ZeRO 1 and 2": (["phicore/zero"], {
        "DeepSpeed, stage_1_and_2.py": ["deepspeed/runtime/zero/stage_1_and_2.py"],
        "torch, ZeroRedundancyOptimizer": ["torch/distributed/optim/zero_redundancy_optimizer.py"],
    }),
    "Trainer": (["phicore/training"], {
        "transformers, Trainer": [
            "transformers/trainer.py", "transformers/trainer_utils.py", "transformers/trainer_callback.py",
            "transformers/trainer_pt_utils.py", "transformers/training_args.py",
        ],
    }),
}  # fmt: skip

LAYOUT = {
    tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip


def code_lines(source: str) -> int:
    """Lines of a Python file that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def count(places: Sequence[str]) -> int | None:
    """Of files and directories of installed packages; None where the package is not installed."""
    total = 0
    for place in places:
        package, _, rest = place.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / rest
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        total += sum(code_lines(file.read_text()) for file in files)
    return total


def measure() -> list[Figure]:
    found = []
    for component, (ours, peers) in COMPONENTS.items():
        mine = count(ours)
        assert mine is not None
        for peer, places in peers.items():
            theirs = count(places)
            if theirs is not None:
                found.append(figures.counted("lines of code", component, "lines", mine, peer, theirs, noise=0.1))
    return found
