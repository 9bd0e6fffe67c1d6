"""Peak memory of `phicore quantize` on a model directory, and of loading what it wrote, beside the sizes of the model.

    python -m benchmarks.quantize_memory [--layers 8] [--shard-mb 300] [--whole] [--peer]

A Llama of random bfloat16 weights (1.2 GB unless asked otherwise) is written shard by shard into a temporary directory.
Each measurement is a fresh process that first does the same on a tiny model, so that imports and caches are there, then
notes its resident memory and resets the kernel's high-water mark. Two figures are printed, both above that baseline:

    VmHWM     the most resident memory at any moment, which the kernel keeps; mapped files count as far as they are in
    RssAnon   the most memory that is the process's own, without mapped files, sampled every millisecond

phicore reads into its own memory and maps no file, so that the two agree; transformers maps what it reads, and a model
that it has loaded comes into memory as it is used. The page cache, which the kernel takes back on demand, is in
neither. Linux only.

--whole also measures load_model, quantize_ and save_model, and --peer transformers with bitsandbytes doing the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.machine import reset_peak, status

MB = 1e6


# ===== the model =====


def make_model(directory: Path, layers: int, hidden: int, vocabulary: int, shard_bytes: int) -> None:
    """Writes a Llama of random weights, with a tokenizer of one word, a tensor at a time."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from phicore.formats.safetensors_files import write_model

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256 or 1, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    directory.mkdir()
    config.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained(directory)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in LlamaForCausalLM(config).state_dict().items()}

    def tensors() -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for key, shape in shapes.items():
            yield {key: torch.empty(shape).normal_(0, 0.02, generator=generator).bfloat16()}

    write_model(tensors(), directory, shard_bytes)


# ===== what is measured, in a process of its own =====


def quantize(source: Path, target: Path) -> None:
    from phicore.formats.streaming import quantize_directory

    quantize_directory(source, target)


def quantize_whole(source: Path, target: Path) -> None:
    import phicore
    from phicore.formats.huggingface import load_model, save_model

    model, tokenizer = load_model(str(source), torch.bfloat16)
    save_model(phicore.quantize_(model), tokenizer, target)  # type: ignore[arg-type]


def quantize_peer(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(target)


def load(source: Path, target: Path) -> None:
    from phicore.formats.huggingface import load_model

    global kept
    kept = load_model(str(source), torch.bfloat16)


def load_peer(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    global kept
    kept = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)


kept: Any = None
TASKS: dict[str, Callable[[Path, Path], None]] = {
    task.__name__: task for task in (quantize, quantize_whole, quantize_peer, load, load_peer)
}


def measure(task: str, small: Path, source: Path, target: Path) -> dict[str, float]:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    TASKS[task](small, target.with_name(target.name + "-small"))
    global kept
    kept = None
    resident, own = status("VmRSS"), status("RssAnon")
    reset_peak()
    most, done = [own], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            most.append(max(most.pop(), status("RssAnon")))

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    TASKS[task](source, target)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return {
        "VmHWM": status("VmHWM") - resident,
        "RssAnon": most[0] - own,
        "RssAnon_after": status("RssAnon") - own,
        "seconds": seconds,
    }


def in_fresh_process(task: str, small: Path, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.quantize_memory"]
    command += ["--measure", task, str(small), str(source), str(target)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    print(
        f"{task:15} peak above the baseline: VmHWM {found['VmHWM'] / MB:7.1f} MB, RssAnon {found['RssAnon'] / MB:7.1f} "
        f"MB; kept at the end {found['RssAnon_after'] / MB:7.1f} MB; {found['seconds']:.1f} s",
        flush=True,
    )
    return found


def beside_transformers(layers: int, hidden: int, vocabulary: int) -> dict[str, list[dict[str, float]]]:
    """What `measure` finds of quantizing one model from directory to directory, twice each, in turn: by phicore
    ("quantize") and by transformers ("quantize_peer")."""
    found: dict[str, list[dict[str, float]]] = {"quantize": [], "quantize_peer": []}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        make_model(place / "small", 1, 256, 64, 1 << 30)
        make_model(place / "model", layers, hidden, vocabulary, int(100 * MB))
        for turn in range(2):
            for task, runs in found.items():
                runs.append(in_fresh_process(task, place / "small", place / "model", place / f"{task}-{turn}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of quantizing a model directory.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--shard-mb", type=int, default=300)
    parser.add_argument("--whole", action="store_true", help="also load the model whole")
    parser.add_argument("--peer", action="store_true", help="also transformers with bitsandbytes")
    parser.add_argument("--measure", nargs=4, metavar=("TASK", "SMALL", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        task, *paths = options.measure
        print(json.dumps(measure(task, *map(Path, paths))))
        return
    from phicore.formats.safetensors_files import model_tensors

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        small, source, coded, small_coded = (place / name for name in ("small", "model", "nf4", "small-nf4"))
        make_model(small, 1, 256, 64, 1 << 30)
        make_model(source, options.layers, options.hidden, options.vocabulary, int(options.shard_mb * MB))
        weights = model_tensors(source)
        sizes = {key: file.entries[key].stop - file.entries[key].start for key, file in weights.items()}
        shards = sorted({file.path: file.path.stat().st_size for file in weights.values()}.values())
        largest = max(sizes, key=lambda key: sizes[key])
        print(
            f"model {sum(sizes.values()) / MB:.1f} MB in {len(shards)} shards, the largest {shards[-1] / MB:.1f} MB; "
            f"largest layer {sizes[largest] / MB:.1f} MB ({largest})",
            flush=True,
        )
        in_fresh_process("quantize", small, source, coded)
        written = sorted(file.stat().st_size for file in coded.glob("*.safetensors"))
        print(f"written {sum(written) / MB:.1f} MB in {len(written)} shards, the largest {written[-1] / MB:.1f} MB")
        if options.whole:
            in_fresh_process("quantize_whole", small, source, place / "whole")
        if options.peer:
            in_fresh_process("quantize_peer", small, source, place / "peer")
        quantize(small, small_coded)
        in_fresh_process("load", small_coded, coded, place / "unused")
        if options.peer:
            in_fresh_process("load_peer", small_coded, coded, place / "unused")


if __name__ == "__main__":
    main()
