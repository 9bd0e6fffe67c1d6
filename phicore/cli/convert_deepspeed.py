"""phicore convert-deepspeed: a ZeRO-1 or ZeRO-2 checkpoint of DeepSpeed as safetensors, or as a run to go on with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from phicore import atomic
from phicore.cli.console import gigabytes, say, stage
from phicore.cli.options import parse
from phicore.training.precision import DTYPES


@dataclass(kw_only=True)
class ConvertDeepspeedOptions:
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Directory that DeepSpeed's save_checkpoint was given, or of one checkpoint in it."""

    output: str
    """Directory to write; must be missing or empty, or, with --to run, hold no run."""

    to: Literal["weights", "run"] = "weights"
    """weights: all that the model has, as model.safetensors. run: what trains and the state of its AdamW, as a
    checkpoint that a Trainer with this output (phicore finetune --method full --resume) goes on from, on any number of
    ranks."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the parameters: auto leaves them as the model computed; others are rounded from the float32 masters that
    16-bit training keeps."""

    overwrite: bool = False
    """Replace what is there."""


def main(arguments: Sequence[str]) -> None:
    """Parses, reads and writes."""
    options = parse(
        ConvertDeepspeedOptions, arguments, "convert-deepspeed", "Convert a ZeRO-1 or ZeRO-2 checkpoint of DeepSpeed."
    )
    from phicore.formats.deepspeed import read_checkpoint
    from phicore.formats.deepspeed_weights import in_dtype, settings_told, trained_tensors, write_weights
    from phicore.training.adopt import adopt
    from phicore.training.metrics import Progress

    atomic.check_apart(options.output, options.checkpoint)
    if options.to == "weights":
        atomic.check_free(options.output, overwrite=options.overwrite)
    progress = Progress(0, 0, what="parameter")
    with stage(f"reading {options.checkpoint}"):
        found = read_checkpoint(
            options.checkpoint,
            lambda done, total: progress.step(done, say=done % 100 == 0 or done == total, total=total),
            mapped=True,
        )
        progress.close()
        if options.dtype != "auto":
            found = in_dtype(found, DTYPES[options.dtype])
    for line in (f"{found.steps} steps, saved by {found.ranks} ranks", *settings_told(found)):
        say(line)
    with stage(f"writing {options.output}"):
        if options.to == "weights":
            path = write_weights(found, options.output, overwrite=options.overwrite)
        else:
            path = adopt(
                trained_tensors(found),
                found.optimizer,
                found.steps,
                options.output,
                origin="DeepSpeed",
                overwrite=options.overwrite,
            )
    say(f"{path}: {gigabytes(sum(file.stat().st_size for file in [path, *path.glob('*')] if file.is_file()))}")
    if options.to == "run":
        say(f"go on with --output {options.output} --resume, and the settings of the run")
