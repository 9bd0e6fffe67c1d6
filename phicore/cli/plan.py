"""phicore plan: what a run of finetune will take, from the model's configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from phicore.cli.console import gigabytes, say, table
from phicore.cli.finetune import FinetuneOptions, adapt, compute_dtype, idle
from phicore.cli.options import parse
from phicore.cli.start import check_options
from phicore.training.memory import StepMemory, step_memory


@dataclass(kw_only=True)
class PlanOptions(FinetuneOptions):
    data: str = ""
    """Not read: every example is taken to have sequence_length tokens."""

    ranks: int = 1
    """Processes that share the run."""


def main(arguments: Sequence[str]) -> None:
    """Parses, counts and prints."""
    what = "Say what a run of `phicore finetune` with the same options will take."
    plan(parse(PlanOptions, arguments, "plan", what, idle))


def plan(options: PlanOptions) -> StepMemory:
    """Prints what each part takes on the fullest rank, and returns it.

    Raises:
        ValueError: what finetune refuses of a model's configuration or of the options.
    """
    from phicore.formats.huggingface import meta_model, model_config

    check_options(options)
    train, ranks = options.train, options.ranks
    dtype, why = compute_dtype(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    say(f"computing in {str(dtype).removeprefix('torch.')}: {why}")
    model = meta_model(model_config(options.model), dtype)
    dense = sum(p.nbytes for p in model.parameters())
    adapt(model, options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = step_memory(model, train, options.sequence_length, ranks)
    kept = "recomputed block by block" if train.gradient_checkpointing else "kept for the backward pass"
    rows = [
        ("frozen weights", found.frozen, ""),
        ("trained parameters", found.trained, f"{trained:,}"),
        ("gradients", found.gradients, f"ZeRO-{train.zero_stage}" if ranks > 1 else ""),
        ("optimizer state", found.optimizer, f"AdamW, 1/{ranks} of it" if ranks > 1 else "AdamW"),
        ("activations", found.activations, f"{found.examples} x {options.sequence_length} tokens, {kept}"),
        ("a block of logits", found.loss, ""),
        ("together", found.total, "at least: temporaries of a layer and the process itself come on top"),
    ]
    title = f"{options.model}, {options.method}" + (f", each of {ranks} ranks" if ranks > 1 else "")
    table(title, ("", "bytes", ""), [(name, gigabytes(size), note) for name, size, note in rows])
    if found.frozen + found.trained < dense:
        say(f"while it loads, before it is in NF4: {gigabytes(dense)}")
    say(f"a checkpoint: {gigabytes(found.checkpoint)} on disk, of which {train.keep_checkpoints} are kept")
    if ranks > 1:
        say(f"each rank sends {gigabytes(found.sent)} a step")
    return found
