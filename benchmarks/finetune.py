"""Fine-tuning end to end beside PEFT (over bitsandbytes for qlora and qdora), on the demo's model and data.

Both sides take the same hyper-parameters, seed, batches and order: phicore by its Trainer, PEFT by the loop its users
write (the model's own loss, AdamW, the same schedule and clipping). Each run is a fresh process; they alternate, and
PEFT runs twice a turn, so that PEFT / PEFT shows the noise.

    python -m benchmarks.finetune [--methods lora dora qlora qdora] [--steps 8] [--turns 3] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
MODEL, TRAIN, EVAL = (ROOT / ".cache/addresses" / n for n in ("SmolLM2-135M-Instruct", "train.jsonl", "eval.jsonl"))
METHODS = ("lora", "dora", "qlora", "qdora")
LENGTH, RANK, ALPHA, EVAL_EXAMPLES = 256, 8, 16, 32


def settings(steps: int, output: str) -> Any:
    from phicore import TrainConfig

    return TrainConfig(
        output=output, steps=steps, batch_size=4, learning_rate=3e-3, warmup_steps=2, log_every=steps, overwrite=True
    )


def run_phicore(method: str, steps: int, dtype: torch.dtype, output: str) -> dict[str, float]:
    import phicore
    from phicore.formats.huggingface import load_model
    from phicore.training.data import load_dataset

    model, tokenizer = load_model(str(MODEL), dtype)
    train = load_dataset(TRAIN, tokenizer, LENGTH)
    held_out = load_dataset(EVAL, tokenizer, LENGTH, EVAL_EXAMPLES)
    if method.startswith("q"):
        phicore.quantize_(model)
    config = phicore.LoRAConfig(rank=RANK, alpha=ALPHA, dora=method.endswith("dora"), adapter_dtype=torch.float32)
    phicore.attach(model, config)
    trainer = phicore.Trainer(model, settings(steps, output), train, held_out)
    before = trainer.evaluate()
    result = trainer.fit()
    after = trainer.evaluate()
    return {"loss_before": before, "loss_after": after, "tokens_per_second": result.tokens_per_second}


def run_peft(method: str, steps: int, dtype: torch.dtype, output: str) -> dict[str, float]:
    import peft
    import transformers

    from phicore.training.data import collate, load_dataset, step_indices
    from phicore.training.schedule import learning_rate

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    train = load_dataset(TRAIN, tokenizer, LENGTH)
    held_out = load_dataset(EVAL, tokenizer, LENGTH, EVAL_EXAMPLES)
    coded = {}
    if method.startswith("q"):
        coded["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, **coded)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        use_dora=method.endswith("dora"),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    train_config = settings(steps, output)
    optimizer = torch.optim.AdamW(trained, betas=(train_config.beta1, train_config.beta2), weight_decay=0.0)

    @torch.no_grad()
    def evaluate() -> float:
        total, count = 0.0, 0
        order = sorted(range(len(held_out)), key=lambda i: len(held_out[i]["input_ids"]))
        for start in range(0, len(order), train_config.eval_batch_size):
            part = [held_out[i] for i in order[start : start + train_config.eval_batch_size]]
            batch = collate(part, pad_id=0)
            n = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**batch).loss) * n, count + n
        return total / count

    before = evaluate()
    tokens, seconds = 0, 0.0
    for step in range(steps):
        start = time.perf_counter()
        batch = collate([train[i] for i in step_indices(len(train), 0, step, 4)], pad_id=0)
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train_config.max_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train_config)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        tokens += int(batch["attention_mask"].sum())
    return {"loss_before": before, "loss_after": evaluate(), "tokens_per_second": tokens / seconds}


def child(who: str, method: str, steps: int, dtype: str, threads: int) -> None:
    """One run; prints its figures as the last line."""
    from phicore.training.metrics import peak_memory_bytes

    torch.set_num_threads(threads)
    run = {"phicore": run_phicore, "peft": run_peft}[who]
    with tempfile.TemporaryDirectory() as output:
        figures = run(method, steps, getattr(torch, dtype), output)
    print(json.dumps({**figures, "peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))}))


def measure(who: str, method: str, options: argparse.Namespace) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.finetune",
        "--child",
        who,
        "--methods",
        method,
        "--dtype",
        options.dtype,
    ]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{who} {method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures of every run here")
    parser.add_argument("--child", choices=("phicore", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not MODEL.is_dir():
        raise SystemExit(f"{MODEL} is missing; run `make demo-data` first")
    if options.dtype == "auto":
        from phicore.training.precision import choose_dtype

        chosen, why = choose_dtype(torch.device("cpu"))
        options.dtype = str(chosen).removeprefix("torch.")
        print(f"{options.dtype}: {why}")
    if options.child:
        child(options.child, options.methods[0], options.steps, options.dtype, options.threads)
        return
    print(f"{options.steps} steps of 4 examples, rank {RANK}, {options.threads} threads, {options.turns} turns")
    print("method  tokens/s  / peft  (peft / peft)  peak memory / peft  loss before -> after (peft)")
    report: dict[str, Any] = {}
    for method in options.methods:
        turns = [
            {
                key: measure(who, method, options)
                for key, who in (("peft", "peft"), ("ours", "phicore"), ("again", "peft"))
            }
            for _ in range(options.turns)
        ]
        report[method] = turns

        def median(value: Any, turns: list[dict[str, Any]] = turns) -> float:
            return statistics.median(value(turn) for turn in turns)

        speed = median(
            lambda t: (
                2 * t["ours"]["tokens_per_second"] / (t["peft"]["tokens_per_second"] + t["again"]["tokens_per_second"])
            )
        )
        noise = median(lambda t: t["again"]["tokens_per_second"] / t["peft"]["tokens_per_second"])
        memory = median(lambda t: t["ours"]["peak_memory_bytes"] / t["peft"]["peak_memory_bytes"])
        ours, peer = turns[0]["ours"], turns[0]["peft"]
        print(
            f"{method:6}  {median(lambda t: t['ours']['tokens_per_second']):8.0f}  {speed:6.3f}  {noise:13.3f}  "
            f"{memory:18.3f}  {ours['loss_before']:.3f} -> {ours['loss_after']:.3f} "
            f"({peer['loss_before']:.3f} -> {peer['loss_after']:.3f})",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "dtype": options.dtype, "turns": report}, indent=1))


if __name__ == "__main__":
    main()
