"""Prints what NF4 costs the demo's model: perplexity on Python's own reference manual, before and after quantizing.

The text comes with Python (pydoc_data.topics), so nothing is downloaded; the model must be there (make demo-data).
"""

import math
import pydoc_data.topics
from pathlib import Path

import torch

import phicore
from phicore.formats.huggingface import load_model
from phicore.training.loss import causal_lm_loss

MODEL = Path(__file__).parents[2] / ".cache/addresses/SmolLM2-135M-Instruct"
ROWS, LENGTH = 16, 256


def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """exp of the mean loss per token over rows of token ids, int64 [rows, length]."""
    with torch.no_grad():
        parts = [causal_lm_loss(model, {"input_ids": row[None], "labels": row[None]}) for row in ids]
    return math.exp(sum(float(loss) for loss, _ in parts) / sum(int(n) for _, n in parts))


def main() -> None:
    model, tokenizer = load_model(str(MODEL), torch.float32)
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in ("typesseq", "formatstrings", "exceptions", "compound"))
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids[: ROWS * LENGTH]).view(-1, LENGTH)
    before = perplexity(model, ids)
    phicore.quantize_(model)
    after = perplexity(model, ids)
    print(f"perplexity on {ids.numel()} tokens of Python's manual: {before:.2f} as converted, {after:.2f} in NF4")


if __name__ == "__main__":
    main()
