"""Scores and answers on the held-out examples of `phicore finetune`, before and after training.

Those from before are kept in before.json beside what the run began with, so that a run that is resumed takes them up.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import phicore
from phicore import atomic
from phicore.cli.console import say, stage
from phicore.training import distributed
from phicore.training.checkpoint import latest_checkpoint
from phicore.training.data import TokenDataset
from phicore.training.encoding import prompt_and_reference
from phicore.training.resume import changed_settings
from phicore.training.scoring import exact_match, span_f1
from phicore.training.shards import digest

if TYPE_CHECKING:
    from phicore.cli.finetune import FinetuneOptions


def digest_of_tokens(data: TokenDataset) -> str:
    """SHA-256 of what the examples became. Their file may be what it was, and the tokenizer or its template not."""
    tokens = hashlib.sha256()
    for example in data:
        for values in (example["input_ids"], example["labels"]):
            tokens.update(values.numpy().tobytes())
    return tokens.hexdigest()


def before_training(
    options: "FinetuneOptions", settings: dict[str, Any], trainer: Any, tokenizer: Any, data: Any
) -> dict[str, Any]:
    """`held_out` before training. It is kept, with all that it depends on, for a run that is resumed: one with other
    held-out settings computes it anew, from the same untrained model.

    Raises:
        ValueError: the run that is resumed began over another base.
    """
    kept = Path(options.train.output) / "before.json"
    asked = {name: getattr(options, name) for name in ("eval_limit", "answers", "max_new_tokens")}
    asked["eval_data_sha256"] = digest(Path(options.eval_data)) if options.eval_data else None
    asked = json.loads(json.dumps({**settings, **asked}))

    def read_kept() -> dict[str, Any] | None:
        newest = latest_checkpoint(trainer.checkpoints) if options.train.resume else None
        if newest is None:
            return None
        trainer.check_base(newest)  # before figures of another base are kept as those of this run
        if not kept.is_file():
            return None
        try:
            known = json.loads(kept.read_text())
            then = known.get("settings", {})
        except (ValueError, AttributeError):
            say(f"{kept} is damaged, and is made anew")
            return None
        if then.get("tokens", asked["tokens"]) != asked["tokens"]:
            say(
                f"{options.data} becomes other tokens than when the run began: the tokenizer or its chat template has "
                f"changed (or writes the date); the steps from here on are over these"
            )
        if not (changed := changed_settings(then, asked)):
            return known
        if "settings" in known:
            say(f"{kept} was written with other settings, and is made anew; {'; '.join(changed)}")
        return None

    if (known := distributed.on_first_rank(read_kept)) is not None:
        return known
    found = held_out(options, trainer, tokenizer, data, "before")
    if distributed.rank() == 0:
        atomic.write_text(kept, json.dumps({"settings": asked, **found}))
    return found


def held_out(options: "FinetuneOptions", trainer: Any, tokenizer: Any, data: Any, when: str) -> dict[str, Any]:
    """Scores and answers on the held-out data."""
    scores: dict[str, float | None] = {"eval_loss": None, "span_f1": None, "exact_match": None}
    answers: list[dict[str, str]] = []
    if data:
        with stage(f"evaluating {when} training"):
            scores["eval_loss"] = trainer.evaluate()
    if data and options.answers:
        from phicore.training.generation import generate

        pairs = [prompt_and_reference(record, tokenizer) for record in data.records[: options.answers]]
        bare = [record.messages is None for record in data.records[: options.answers]]  # a chat template writes its own
        with stage(f"answering {len(pairs)} held-out examples {when} training"), _merged(trainer.model):
            rank, ranks = distributed.rank(), distributed.world_size()
            mine = generate(
                trainer.model,
                tokenizer,
                [prompt for prompt, _ in pairs[rank::ranks]],
                options.max_new_tokens,
                batch_size=64,
                add_special_tokens=bare[rank::ranks],
            )
            texts = [""] * len(pairs)
            for other, part in enumerate(distributed.together(lambda: mine)):
                texts[other::ranks] = part
        references = [reference for _, reference in pairs]
        scores["span_f1"] = span_f1(texts, references)
        scores["exact_match"] = exact_match(texts, references)
        answers = [{"prompt": p, "reference": r, "answer": t} for (p, r), t in zip(pairs, texts, strict=True)]
    return {"scores": scores, "answers": answers}


@contextmanager
def _merged(model: torch.nn.Module) -> Iterator[None]:
    """Within it, adapted layers are dense: generating decodes each weight once and not once a token."""
    adapted = any(True for _ in phicore.adapters.adapter_layers(model))
    if adapted:
        phicore.merge(model)
    try:
        yield
    finally:
        if adapted:
            phicore.unmerge(model)
