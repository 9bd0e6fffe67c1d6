"""What `phicore finetune` shows and writes when a run is done: a table, answers.jsonl and loss.png."""

import io
import json
import re
from pathlib import Path
from typing import Any

from phicore import atomic
from phicore.cli.console import gigabytes, say, table


def write_answers(output: Path, before: list[dict[str, str]], after: list[dict[str, str]]) -> None:
    """answers.jsonl: a line an example."""
    lines = [
        json.dumps(
            {"prompt": a["prompt"], "reference": a["reference"], "before": b["answer"], "after": a["answer"]},
            ensure_ascii=False,
        )
        for b, a in zip(before, after, strict=True)
    ]
    atomic.write_text(output / "answers.jsonl", "".join(line + "\n" for line in lines))


def plot_loss(output: Path) -> None:
    """loss.png, from metrics.jsonl: nats a token, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
    axes.set(xlabel="step", ylabel="loss per token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    atomic.write_bytes(output / "loss.png", picture.getvalue())


def show(result: dict[str, Any], before: list[dict[str, str]], after: list[dict[str, str]], samples: int) -> None:
    """Prints what a run changed: some answers side by side, the scores, and what the steps took."""
    if after and samples:
        rows = [
            [_last_turn(a["prompt"]), b["answer"].strip(), a["answer"].strip(), a["reference"]]
            for b, a in list(zip(before, after, strict=True))[:samples]
        ]
        table("held-out examples", ["prompt", "before", "after", "reference"], rows, lines=True)
    rows = [
        [name.replace("_", " "), _figure(result[f"{name}_before"]), _figure(result[f"{name}_after"])]
        for name in ("eval_loss", "span_f1", "exact_match")
        if result[f"{name}_after"] is not None
    ]
    if rows:
        table("held out", ["", "before", "after"], rows)
    kind = "resident memory" if result["machine"]["device"] == "cpu" else "memory"  # of a CPU, with mapped files
    say(
        f"{result['steps']} steps, {result['tokens']:,} tokens at {result['tokens_per_second']:.0f} tokens/s; "
        f"peak {kind} {gigabytes(result['peak_memory_bytes'])}; {result['wall_seconds']:.0f} s in all"
    )


def _last_turn(prompt: str) -> str:
    """A rendered prompt without its tags: what stands before the turn that is asked for."""
    pieces = [piece.strip() for piece in re.split(r"<\|[^|<>]*\|>|</?s>", prompt) if piece.strip()]
    roles = ("system", "user", "assistant")
    texts = [re.sub(rf"^({'|'.join(roles)})\n+", "", piece) for piece in pieces if piece not in roles]
    return texts[-1] if texts else prompt


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
