"""Short runs of phicore finetune."""

from pathlib import Path

from phicore.cli import main

HELD_OUT = ["--eval-limit", "6", "--answers", "3", "--max-new-tokens", "4"]


def run(model: Path, data: Path, output: Path, *more: str) -> int:
    return main(
        ["finetune", "--model", str(model), "--data", str(data), "--output", str(output), "--steps", "4",
         *([] if "full" in more else ["--rank", "4", "--alpha", "6"]), "--batch-size", "2", "--learning-rate", "1e-2",
         "--warmup-steps", "1", "--log-every", "1", "--dtype", "float32", *more]
    )  # fmt: skip
