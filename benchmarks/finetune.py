"""Fine-tuning end to end beside PEFT (over bitsandbytes for qlora and qdora), on the demo's model and data.

Both sides take the same hyper-parameters, seed, batches and order: phicore by its Trainer, PEFT by the loop that its
users write (the model's own loss, AdamW, the same schedule and clipping). PEFT, phicore and PEFT again run each in a
process of its own and take their steps in turn, one at a time, each the same batch: a turn is one step of each, so what
else the machine does meets all three alike. The first step warms up. The second PEFT starts from another seed of the
adapter: how far its held-out loss lies from the first one's is the noise of the losses.

Both sides are given the same padded batches, and tokens/s counts real tokens. phicore leaves the padding out by itself
(`phicore.training.packing`), and part of its advantage is that; PEFT's loop computes it, as any loop over padded
batches does. A user of PEFT can leave it out too, with transformers' DataCollatorWithFlattening; that is not measured.

    python -m benchmarks.finetune [--quick] [--methods lora dora qlora qdora] [--steps 6] [--json FILE]
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures
from benchmarks.figures import Figure
from benchmarks.layers import METHODS, peer_name
from benchmarks.machine import ROOT, compile_formulas
from benchmarks.pairs import ratio

MODEL, TRAIN, EVAL = (ROOT / ".cache/addresses" / n for n in ("SmolLM2-135M-Instruct", "train.jsonl", "eval.jsonl"))
LENGTH, RANK, ALPHA, SEED = 256, 8, 16, 0

Gate = Callable[[], None]
"""Called before each step; returns when the step may begin, and raises Enough when there are to be no more."""


class Enough(Exception):
    """The steps asked for are done."""


# ===== the two sides: each calls gate() before a step, and returns its held-out loss and the tokens of each step =====


def settings(options: argparse.Namespace, output: str) -> Any:
    from phicore import TrainConfig

    return TrainConfig(
        output=output, steps=options.steps + 1, batch_size=options.batch_size, learning_rate=3e-3, warmup_steps=2,
        log_every=1000, seed=SEED, overwrite=True,
    )  # fmt: skip


def run_phicore(method: str, dtype: torch.dtype, options: argparse.Namespace, gate: Gate) -> dict[str, Any]:
    import phicore
    from phicore.formats.huggingface import load_model
    from phicore.training.data import load_dataset
    from phicore.training.loss import causal_lm_loss

    model, tokenizer = load_model(str(MODEL), dtype)
    train = load_dataset(TRAIN, tokenizer, LENGTH)
    held_out = load_dataset(EVAL, tokenizer, LENGTH, options.eval_examples)
    if method.startswith("q"):
        phicore.quantize_(model)
    torch.manual_seed(SEED)
    config = phicore.LoRAConfig(rank=RANK, alpha=ALPHA, dora=method.endswith("dora"), adapter_dtype=torch.float32)
    phicore.attach(model, config)
    tokens = []

    def loss(network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        if network.training:
            gate()
            tokens.append(int(batch["attention_mask"].sum()))
        return causal_lm_loss(network, batch)

    with tempfile.TemporaryDirectory() as output:
        trainer = phicore.Trainer(model, settings(options, output), train, held_out, loss)
        with contextlib.suppress(Enough):
            trainer.fit()
        return {"tokens": tokens, "peak": peak(), "loss": trainer.evaluate()}


def run_peft(method: str, dtype: torch.dtype, options: argparse.Namespace, gate: Gate) -> dict[str, Any]:
    import peft
    import transformers

    from phicore.training.data import collate, load_dataset, step_indices
    from phicore.training.schedule import learning_rate

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    train = load_dataset(TRAIN, tokenizer, LENGTH)
    held_out = load_dataset(EVAL, tokenizer, LENGTH, options.eval_examples)
    coded = {}
    if method.startswith("q"):
        coded["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, **coded)
    torch.manual_seed(options.adapter_seed)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        use_dora=method.endswith("dora"),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    train_config = settings(options, "unused")
    optimizer = torch.optim.AdamW(trained, betas=(train_config.beta1, train_config.beta2), weight_decay=0.0)

    @torch.no_grad()
    def evaluate() -> float:
        # The mode is left: in evaluation mode bitsandbytes repacks its weights on some CPUs. There is no dropout.
        total, count = 0.0, 0
        order = sorted(range(len(held_out)), key=lambda i: len(held_out[i]["input_ids"]))
        for start in range(0, len(order), train_config.eval_batch_size):
            part = [held_out[i] for i in order[start : start + train_config.eval_batch_size]]
            batch = collate(part, pad_id=0)
            n = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**batch).loss) * n, count + n
        return total / count

    tokens = []
    with contextlib.suppress(Enough):
        for step in range(train_config.steps):
            batch = collate([train[i] for i in step_indices(len(train), SEED, step, options.batch_size)], pad_id=0)
            gate()
            tokens.append(int(batch["attention_mask"].sum()))
            model(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, train_config.max_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, train_config)
            optimizer.step()
            optimizer.zero_grad()
    return {"tokens": tokens, "peak": peak(), "loss": evaluate()}


def peak() -> int:
    from phicore.training.metrics import peak_memory_bytes

    return peak_memory_bytes(torch.device("cpu"))


# ===== processes that take their steps in turn =====


def child(options: argparse.Namespace) -> None:
    """One side. Says "ready" before each step and waits for "go" or "stop"; its last line is its findings."""
    torch.set_num_threads(options.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not for the parent

    def gate() -> None:
        print("ready", file=answers, flush=True)
        word = sys.stdin.readline().strip()
        if not word:  # the parent has gone
            raise SystemExit
        if word != "go":
            raise Enough

    run = {"phicore": run_phicore, "peft": run_peft}[options.child]
    print(json.dumps(run(options.methods[0], getattr(torch, options.dtype), options, gate)), file=answers, flush=True)


class Side:
    """A process that runs one side, up to its next gate."""

    def __init__(self, who: str, method: str, options: argparse.Namespace, adapter_seed: int = SEED) -> None:
        command = [sys.executable, "-m", "benchmarks.finetune", "--child", who, "--methods", method]
        for name in ("dtype", "steps", "batch_size", "eval_examples", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--adapter-seed", str(adapter_seed)]
        self.who = f"{who} {method}"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"{self.errors.read()[-3000:]}\n{self.who} failed")
        return line

    def step(self) -> float:
        """Seconds of one step, from the word that begins it to the next gate."""
        start = time.perf_counter()
        self.tell("go")
        self.answer()
        return time.perf_counter() - start

    def finish(self) -> dict[str, Any]:
        """Ends training after the last step and returns what the side found."""
        self.tell("stop")
        found = json.loads(self.answer())
        self.process.wait()
        return found

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        # Not by SIGTERM, which a Trainer answers when its step is done: it would wait at the gate for ever.
        with self.process as process, contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
        self.errors.close()


def measure(method: str, options: argparse.Namespace) -> list[Figure]:
    with (
        Side("peft", method, options) as peft,
        Side("phicore", method, options) as ours,
        Side("peft", method, options, SEED + 1) as again,
    ):
        sides = (peft, ours, again)
        for side in sides:
            assert side.answer() == "ready\n"
        turns = [(peft.step(), ours.step(), again.step()) for _ in range(options.steps)]
        theirs, mine, repeated = (side.finish() for side in sides)
    if theirs["tokens"] != mine["tokens"]:
        raise SystemExit(f"{method}: the sides saw other batches: tokens {theirs['tokens']} and {mine['tokens']}")
    pair = ratio(turns[1:])
    tokens = mine["tokens"][1:]
    speed = [  # the peer's of both its turns, as the ratio is
        statistics.median(n / seconds(turn) for n, turn in zip(tokens, turns[1:], strict=True))
        for seconds in (lambda turn: turn[1], lambda turn: (turn[0] + turn[2]) / 2)
    ]
    peer = peer_name(method)
    print(
        f"{method:6} {speed[0]:6.0f} tokens/s, / peft {1 / pair.ratio:.3f} (self-pair {1 / pair.self_pair:.3f}); peak "
        f"{mine['peak'] / 1e9:.2f} GB ({theirs['peak'] / 1e9:.2f}); held-out loss {mine['loss']:.3f} "
        f"({theirs['loss']:.3f}, another seed {repeated['loss']:.3f})",
        flush=True,
    )
    return [
        Figure(group="training speed", name=method, unit="tokens/s", ours=speed[0], peer=peer, theirs=speed[1],
               advantage=1 / pair.ratio, noise=pair.noise, better="higher"),
        figures.counted("peak memory", method, "MB", mine["peak"] / 1e6, peer, theirs["peak"] / 1e6, noise=0.01),
        figures.counted(f"held-out loss after {options.steps} steps", method, "", mine["loss"], peer, theirs["loss"],
                        noise=max(0.01, abs(repeated["loss"] / theirs["loss"] - 1))),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="qdora only, three steps of two examples")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=6, help="of which the first is not counted")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-examples", type=int, default=16)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", choices=("phicore", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--adapter-seed", type=int, default=SEED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    if not MODEL.is_dir():
        raise SystemExit("the demo's model and data are missing; run `make demo-data` first")
    if options.quick:
        options.methods, options.steps, options.batch_size, options.eval_examples = ["qdora"], 3, 2, 4
    dtype, why = figures.dtype(options.dtype)
    options.dtype = str(dtype).removeprefix("torch.")
    print(f"{options.dtype}: {why}; {options.steps} steps of {options.batch_size} examples, rank {RANK}", flush=True)
    formulas = compile_formulas()
    found = [figure for method in options.methods for figure in measure(method, options)]
    if options.json:
        told = {
            "formulas": formulas,
            "model": "SmolLM2-135M-Instruct",
            "dtype": f"{options.dtype} ({why})",
            "rank": RANK,
        }
        told |= {"steps": options.steps, "examples a step": options.batch_size, "held out": options.eval_examples}
        told |= {"padding": "in every batch; phicore leaves it out of its steps, PEFT computes it"}
        figures.write(options.json, told, found)


if __name__ == "__main__":
    main()
