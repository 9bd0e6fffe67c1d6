"""phicore finetune: a model, JSONL data and a method in; an adapter and what it changed out."""

import json
import platform
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import phicore
from phicore import atomic, products
from phicore.adapters.config import LoRAConfig
from phicore.cli import version_of
from phicore.cli.console import gigabytes, say, stage
from phicore.cli.held_out import before_training, digest_of_tokens, held_out
from phicore.cli.options import parse_everywhere
from phicore.cli.report import plot_loss, show, write_answers
from phicore.cli.start import accepted, check_options, read_data, remove_results, result_directory
from phicore.training import distributed
from phicore.training.checkpoint import latest_checkpoint, read_state
from phicore.training.config import TrainConfig, fixed_settings
from phicore.training.data import TokenDataset, load_dataset
from phicore.training.metrics import peak_memory_bytes
from phicore.training.output import after_restart
from phicore.training.precision import DTYPES, choose_dtype
from phicore.training.schedule import learning_rate
from phicore.training.shards import digest
from phicore.training.watch import Watch


@dataclass(kw_only=True)
class AdapterOptions(LoRAConfig):
    target_modules: tuple[str, ...] = ("all-linear",)
    """Layers to adapt: all-linear (all but the output head), names or ".name" suffixes, or one regular expression that
    matches whole names."""

    layers_to_transform: tuple[int, ...] | None = None
    """Only the target modules in the blocks of these numbers; all by default."""

    layers_pattern: tuple[str, ...] | None = None
    """Names of the numbered lists that layers_to_transform counts in; by default the first in a layer's name."""

    trainable_token_indices: tuple[int, ...] | None = None
    """Tokens whose rows of the input embedding train, the others staying frozen; a head tied to it follows."""

    dora: Annotated[bool, tyro.conf.Suppress] = False  # --method says it
    adapter_dtype: Annotated[torch.dtype | None, tyro.conf.Suppress] = None  # float32: AdamW's steps vanish in 16 bits

    def config(self, method: str) -> LoRAConfig:
        """The LoRAConfig that these options and the method amount to."""
        values = {name: getattr(self, name) for name in LoRAConfig.__dataclass_fields__}
        targets = self.target_modules
        alone = len(targets) == 1 and (targets[0] == "all-linear" or re.search(r"[\\^$*+?{}\[\]|()]", targets[0]))
        values["target_modules"] = targets[0] if alone else list(targets)
        return LoRAConfig(**(values | {"dora": method in ("dora", "qdora"), "adapter_dtype": torch.float32}))


@dataclass(kw_only=True)
class FinetuneOptions:
    model: str
    """Model directory (transformers: safetensors, or one GGUF file), .gguf file, or name on the hub."""

    data: str
    """Training data, JSONL: {"messages": [...]}, {"prompt", "completion"} or {"text"} a line."""

    eval_data: str | None = None
    """Held-out data of the same form, evaluated before and after."""

    method: Literal["lora", "dora", "qlora", "qdora", "full"] = "qlora"
    """What trains: an adapter over the model as it is (lora, dora) or in NF4 (qlora, qdora), or all weights."""

    sequence_length: int = 512
    """Tokens an example may have; longer ones are cut, and counted."""

    eval_limit: int | None = None
    """Lines of eval_data to use, a conversation being one; all of them by default."""

    answers: int = 0
    """Held-out examples that the model answers before and after; the answers are scored by exact match and by the F1
    of their "text: label" lines."""

    samples: int = 3
    """Of these, how many are shown."""

    max_new_tokens: int = 128
    """Tokens an answer may have."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and products. auto: that of a run that is resumed; float32 for method full; else bfloat16 on GPUs that
    have it and on CPUs where it measures at least 1.2 times as fast as float32, float32 elsewhere."""

    block_size: int = 64
    """Weights that share a scale in NF4."""

    double_quant: bool = True
    """Hold NF4's scales in 8 bits."""

    threads: int | None = None
    """CPU threads; torch's own choice by default."""

    deepspeed: str | None = None
    """A DeepSpeed configuration (JSON) to take batch sizes, optimizer, schedule and dtype from; what it leaves open or
    says "auto" to stays as the other options have it, and what both say differently is an error."""

    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    """Of the training loop."""  # and not TrainConfig's docstring, which points here


def idle(options: FinetuneOptions) -> list[tuple[bool, str, Collection[str]]]:
    """Which options have no effect beside the others, see `parse`."""
    method, adapter = options.method, {f.name for f in fields(AdapterOptions)}
    return [
        (method == "full", "with --method full, which has no adapter", {*adapter, "lora_plus_ratio"}),
        (method[0] != "q", f"with --method {method}, which has no NF4", {"block_size", "double_quant"}),
        (options.adapter.target_modules == ("all-linear",), "with all-linear, which takes fused layers whole",
         {"fused_targets"}),
        (not options.eval_data, "without --eval-data", {"eval_limit", "eval_batch_size"}),
        (not options.answers, "without --answers", {"samples", "max_new_tokens"}),
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Parses and runs."""
    what = "Fine-tune a causal language model."
    options = parse_everywhere(FinetuneOptions, arguments, "finetune", what, _join, idle)
    try:
        finetune(options)
    except KeyboardInterrupt as stop:
        if distributed.rank() > 0:  # rank 0 tells
            raise SystemExit(130) from stop
        raise KeyboardInterrupt(_kept(options.train)) from stop


def _kept(train: TrainConfig) -> str:
    """What there is of a run that Ctrl-C ended."""
    try:
        newest = latest_checkpoint(Path(train.output) / "checkpoints")
    except (OSError, ValueError):  # --resume tells what is wrong there
        newest = None
    later = ", or one that is still being written" if train.async_save else ""
    if newest is None:
        return f"{train.output} holds no checkpoint yet{later}"
    return f"the newest checkpoint is {newest}{later}, and --resume goes on from it"


def _join(options: FinetuneOptions | None) -> None:
    distributed.join((TrainConfig() if options is None else options.train).first_step_timeout)


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Runs a fine-tuning from the files to the saved adapter; returns what result.json holds.

    On several ranks (torchrun) each loads the model and the data, all share the training, the evaluations and the
    answers, and rank 0 prints and writes.

    Writes into options.train.output: adapter/ (PEFT's format; model/ for method full), checkpoints/, metrics.jsonl,
    answers.jsonl, loss.png and result.json.
    """
    from phicore.formats.huggingface import save_model

    start = time.perf_counter()
    _join(options)
    watch = Watch(Path(options.train.output))
    with watch.during("reading the options"):
        if (deepspeed := options.deepspeed) is not None:
            options = distributed.everywhere(lambda: _with_deepspeed(options, deepspeed))
        options = replace(options, train=after_restart(options.train))
        output = Path(options.train.output)
        distributed.everywhere(lambda: check_options(options))
        examples = distributed.everywhere(lambda: read_data(options))
        if options.threads:
            torch.set_num_threads(options.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, why = distributed.on_first_rank(lambda: compute_dtype(options, device))
        identity = distributed.everywhere(lambda: _identity(options, dtype))
    settings = {**fixed_settings(options.train), "examples": examples, **identity}
    ranks = distributed.world_size()
    several = f", on {ranks} ranks" if ranks > 1 else ""
    say(f"computing in {str(dtype).removeprefix('torch.')} on {device}{several}: {why}")
    if (steps := options.train.steps) <= options.train.warmup_steps:
        reached, peak = learning_rate(steps - 1, options.train), options.train.learning_rate
        say(f"the learning rate reaches {reached:.3g} of {peak:.3g}: all {steps} steps are within warmup_steps")
    with accepted(options.train, settings, watch):
        with watch.during("loading the model and the data"):
            model, tokenizer, train_data, eval_data = _loaded(options, dtype, device)
            tokens = distributed.on_first_rank(lambda: digest_of_tokens(train_data))
            base_bytes_before = _bytes(model)
            with stage(f"preparing the model for {options.method}"):
                distributed.everywhere(lambda: adapt(model, options))
        sizes = _sizes(model, options.method, base_bytes_before)
        trainer = phicore.Trainer(model, options.train, train_data, eval_data, identity=identity)
        with watch.during("the held-out examples before training"):
            before = before_training(options, {**settings, "tokens": tokens}, trainer, tokenizer, eval_data)
            if options.train.overwrite:
                distributed.on_first_rank(lambda: remove_results(output))
    trained = trainer.fit()
    with watch.during("writing what was trained"):
        result_path = output / result_directory(options.method)
        if options.method == "full":
            with stage(f"writing {result_path}"):
                distributed.on_first_rank(lambda: save_model(model, tokenizer, result_path, overwrite=True))
        else:
            distributed.on_first_rank(lambda: phicore.save_adapter(model, result_path))
    with watch.during("the held-out examples after training"):
        after = held_out(options, trainer, tokenizer, eval_data, "after")

    result = {
        **{f"{key}_before": value for key, value in before["scores"].items()},
        **{f"{key}_after": value for key, value in after["scores"].items()},
        "train_loss": trained.loss,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "tokens_per_second": trained.tokens_per_second,
        "train_seconds": trained.seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        **sizes,
        "wall_seconds": time.perf_counter() - start,
        "examples": {"train": len(train_data), "eval": len(eval_data or ()), "answered": len(after["answers"])},
        "dtype": str(dtype).removeprefix("torch."),
        "options": asdict(options) | {"adapter": _plain(asdict(options.adapter))},
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), "device": str(device)},
        "ranks": ranks,
        "versions": {name: version_of(name) for name in ("phicore", "torch", "transformers")},
    }
    if distributed.rank() == 0:
        write_answers(output, before["answers"], after["answers"])
        plot_loss(output)
        atomic.write_text(output / "result.json", json.dumps(result, indent=2) + "\n")
    show(result, before["answers"], after["answers"], options.samples)
    say(f"{result_path.name}: {result_path}   figures: {output / 'result.json'}   loss: {output / 'loss.png'}")
    return result


def _loaded(
    options: FinetuneOptions, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any, TokenDataset, TokenDataset | None]:
    """The model on the device, its tokenizer, and the data for training and evaluation, which fit the model."""
    from phicore.formats.huggingface import load_model

    with stage(f"loading {options.model}"):
        model, tokenizer = distributed.everywhere(lambda: load_model(options.model, dtype))
        torch.nn.Module.to(model, device)
    train_data, eval_data = distributed.everywhere(lambda: _load_data(options, tokenizer))
    _check_positions(model, train_data, eval_data)
    distributed.everywhere(lambda: _check_causal(model))
    return model, tokenizer, train_data, eval_data


def _check_positions(model: Any, *data: TokenDataset | None) -> None:
    """Raises ValueError for examples that are longer than the model has positions."""
    from phicore.training.generation import positions_of

    limit = positions_of(model)
    longest = max(min(part.longest, part.sequence_length) for part in data if part is not None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"the examples have up to {longest} tokens and {type(model).__name__} {limit} positions; give "
            f"--sequence-length {limit}, which cuts them"
        )


@torch.no_grad()
def _check_causal(model: Any) -> None:
    """Raises ValueError for a model whose tokens see later ones, as BERT's do: it would learn to copy them."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 4), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    ids[1, -1] = (ids[0, -1] + 1) % vocabulary
    one, other = model(input_ids=ids.to(model.device)).logits[:, :-1].float()  # [3, V]: the last token aside
    apart = (one - other).norm(dim=-1) / one.norm(dim=-1)
    if float(apart.min()) > max(1e-4, 4 * torch.finfo(model.dtype).eps):
        raise ValueError(
            f"{type(model).__name__} is not causal: what it says of a token depends on those behind it, so it would "
            f'learn to copy what it shall predict; give a causal language model (BERT is one with "is_decoder": true '
            f"in config.json)"
        )


def adapt(model: torch.nn.Module, options: FinetuneOptions) -> None:
    """Makes a loaded model what the method trains: in NF4, with adapters, or all of it."""
    already = next((layer for layer in model.modules() if isinstance(layer, phicore.NF4Linear)), None)
    if already is not None:
        if options.method == "full":
            raise ValueError(f"{options.model} is in NF4, which does not train; take --method qlora or qdora")
        say(f"it is in NF4 already, of block_size {already.block_size} and double_quant {already.double_quant}")
    coded = options.method in ("qlora", "qdora") and already is None
    if coded and options.adapter.init != "loftq":  # which codes what it adapts when it is attached
        phicore.quantize_(model, block_size=options.block_size, double_quant=options.double_quant)
    torch.manual_seed(options.train.seed)
    if options.method == "full":
        model.requires_grad_(True)
    else:
        phicore.attach(model, options.adapter.config(options.method))


def compute_dtype(options: FinetuneOptions, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights and products, and the reason in words."""
    newest = latest_checkpoint(Path(options.train.output) / "checkpoints") if options.train.resume else None
    if options.dtype != "auto":
        dtype = DTYPES[options.dtype]
        slow = device.type == "cpu" and dtype in products.EMULATED
        crawl = ", though layers without NF4 or an adapter run at a fraction of float32's speed in it on this CPU"
        return dtype, f"as asked{crawl if slow else ''}"
    settings = None if newest is None else read_state(newest)["settings"]
    if settings is not None:  # a measurement may come out otherwise the second time
        if settings.get("dtype") not in DTYPES:
            raise ValueError(
                f"{newest} is of a run that phicore finetune did not make; go on with it where it was made"
            )
        return DTYPES[settings["dtype"]], "as the run that is resumed"
    if options.method == "full":
        return torch.float32, "all weights train, and AdamW's steps vanish in 16 bits"
    return choose_dtype(device)


def _with_deepspeed(options: FinetuneOptions, path: str) -> FinetuneOptions:
    """The options with what a DeepSpeed configuration says."""
    from phicore.formats.deepspeed_config import read_config

    found = read_config(path, options.train, distributed.world_size())
    for note in found.notes:
        say(f"{path}: {note}")
    if found.dtype is None:
        return replace(options, train=found.train)
    dtype = str(found.dtype).removeprefix("torch.")
    if found.dtype == torch.float16 or options.dtype not in ("auto", dtype):
        asked = "--dtype takes float32 or bfloat16" if options.dtype == "auto" else f"--dtype says {options.dtype}"
        raise ValueError(f"{path} asks for {dtype}, but {asked}")
    return replace(options, train=found.train, dtype=dtype)  # type: ignore[arg-type]


def _load_data(options: FinetuneOptions, tokenizer: Any) -> tuple[TokenDataset, TokenDataset | None]:
    train = _load(options.data, tokenizer, options.sequence_length, None)
    if not options.eval_data:
        return train, None
    return train, _load(options.eval_data, tokenizer, options.sequence_length, options.eval_limit)


def _load(path: str, tokenizer: Any, sequence_length: int, limit: int | None) -> TokenDataset:
    with stage(f"encoding {path}"):
        data = load_dataset(path, tokenizer, sequence_length, limit)
    say(f"{path}: {len(data)} examples, {data.tokens:,} tokens, {data.loss_tokens:,} of them carry loss")
    if (report := data.report()) is not None:
        say(f"{path}: {report}")
    return data


def _sizes(model: torch.nn.Module, method: str, base_bytes_before: int) -> dict[str, int]:
    """What of a prepared model trains, and the bytes of its base; they are told, too."""
    trained = [p for p in model.parameters() if p.requires_grad]
    trainable, base_bytes_after = sum(p.numel() for p in trained), _bytes(model)
    if method != "full":
        base_bytes_after -= sum(p.nbytes for p in trained)
    say(f"model: {gigabytes(base_bytes_before)} before, {gigabytes(base_bytes_after)} after")
    say(f"{method}: {trainable:,} trainable parameters")
    return {
        "trainable_parameters": trainable,
        "base_bytes_before": base_bytes_before,
        "base_bytes_after": base_bytes_after,
    }


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of the distinct parameters and buffers."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def _identity(options: FinetuneOptions, dtype: torch.dtype) -> dict[str, Any]:
    """What must be equal for the run to be resumed, beyond the Trainer's own settings."""
    adapter = {} if options.method == "full" else _plain(asdict(options.adapter))
    nf4 = {"block_size": options.block_size, "double_quant": options.double_quant} if options.method[0] == "q" else {}
    return {
        "model": options.model,
        "data_sha256": digest(Path(options.data)),
        "method": options.method,
        "sequence_length": options.sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
        **nf4,
        **adapter,
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists for tuples, no dtypes."""
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in ("dora", "adapter_dtype")}))
