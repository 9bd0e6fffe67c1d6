"""LoRA, DoRA, QLoRA and QDoRA layers beside PEFT's (over bitsandbytes for the last two): a step's time, the bytes that
it saves, and what torch.compile makes of the layer.

A step is the forward and the backward pass of one linear layer, gradients to x and to the adapter. Times are of
alternating turns in this process: PEFT's layer, phicore's, the frozen base, PEFT's again.

    python -m benchmarks.layers [--quick] [--dtype auto] [--width 576 2048] [--tokens 512] [--rank 16 128] [--json FILE]

In 16 bits on a CPU that has no such products a step of a peer takes 10 s and more; `--dtype bfloat16 --turns 1
--warm-ups 0` then tells enough. What the adapter adds to the frozen base alone is more where the base is faster:
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment measures a CPU with matrix units (AMX) as if it had none.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import phicore
from benchmarks import figures
from benchmarks.figures import Figure
from benchmarks.machine import compile_formulas
from benchmarks.pairs import ratio, rounds

METHODS = ("lora", "dora", "qlora", "qdora")
COMPILED_WIDTH, COMPILED_TOKENS, COMPILED_RANK = 256, 64, 16  # compiling costs the same at any size


def our_layer(method: str, weight: Tensor, rank: int, dropout: float) -> nn.Module:
    base = linear(weight)
    if method.startswith("q"):
        base = phicore.NF4Linear.from_linear(base)
    make = phicore.DoRALinear if method.endswith("dora") else phicore.LoRALinear
    return make(base, rank=rank, alpha=2 * rank, dropout=dropout)


def peft_layer(method: str, weight: Tensor, rank: int, dropout: float) -> nn.Module:
    import peft

    base = bitsandbytes_layer(weight) if method.startswith("q") else linear(weight)
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["0"], use_dora=method.endswith("dora")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    return model.base_model.model[0]


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def bitsandbytes_layer(weight: Tensor) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu").train()


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(grad)

    return run


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes kept for the backward pass beside the layer's own tensors and x."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(kept.values())


def peer_name(method: str) -> str:
    return "peft + bitsandbytes" if method.startswith("q") else "peft"


def measure(width: int, tokens: int, dtype: torch.dtype, options: argparse.Namespace) -> list[Figure]:
    """Step times and saved bytes of every method, rank and dropout at one width."""
    weight = torch.randn(width, width).div(width**0.5).to(dtype)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, width, dtype=dtype)
    bases = {False: linear(weight), True: phicore.NF4Linear.from_linear(linear(weight))}
    found = []
    for method in options.methods:
        for rank in options.rank:
            for dropout in options.dropout:
                name = f"{method}, {width} wide, rank {rank}" + (f", dropout {dropout:g}" if dropout else "")
                name += f", {tokens} tokens" if len(options.tokens) > 1 else ""
                ours, peer = (make(method, weight, rank, dropout) for make in (our_layer, peft_layer))
                runs = [step(layer, x, grad) for layer in (peer, ours, bases[method.startswith("q")], peer)]
                turns = rounds([runs[0], runs[1], runs[2], runs[0]], options.turns, options.warm_ups)
                to_peer = ratio((before, mine, after) for before, mine, _, after in turns)
                to_base = ratio((base, mine, base) for _, mine, base, _ in turns)
                kept = [saved_bytes(layer, x) / 1e6 for layer in (ours, peer)]
                found += [
                    figures.timed("step time", name, peer_name(method), to_peer),
                    figures.counted("saved for the backward pass", name, "MB", kept[0], peer_name(method), kept[1]),
                    figures.counted(
                        "step time over that of the frozen base alone", name, "x", to_base.ratio, noise=to_peer.noise
                    ),
                ]
                beside = f"/ peft {to_peer}; / frozen base {to_base.ratio:.3f}"
                print(f"{name:40} {beside}; saved MB {kept[0]:.2f} ({kept[1]:.2f})", flush=True)
    return found


def compiled(layer: nn.Module, dtype: torch.dtype) -> tuple[float, int]:
    """Seconds that torch.compile needs for a first step, nothing cached, and the graphs that it made of the layer."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    torch._dynamo.reset()
    counters.clear()
    x = torch.randn(COMPILED_TOKENS, COMPILED_WIDTH, dtype=dtype, requires_grad=True)
    with config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        torch.compile(layer)(x).sum().backward()
        seconds = time.perf_counter() - start
    return seconds, counters["stats"]["unique_graphs"]


def measure_compiled(dtype: torch.dtype, methods: list[str]) -> list[Figure]:
    weight = torch.randn(COMPILED_WIDTH, COMPILED_WIDTH).div(COMPILED_WIDTH**0.5).to(dtype)
    # What the first compilation pays once: the compiler's own processes and its precompiled header.
    compiled(nn.Sequential(linear(weight), nn.GELU()), dtype)
    found = []
    for method in methods:
        ours, peer = (compiled(make(method, weight, COMPILED_RANK, 0.0), dtype) for make in (our_layer, peft_layer))
        found += [
            figures.counted("torch.compile: first step", method, "s", ours[0], peer_name(method), peer[0], noise=0.1),
            figures.counted("torch.compile: graphs", method, "", ours[1], peer_name(method), peer[1]),
        ]
        print(f"{method:6} compiled in {ours[0]:.1f} s ({peer[0]:.1f}), graphs {ours[1]} ({peer[1]})", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="width 1024, three turns, compile LoRA and QDoRA only")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--width", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--warm-ups", type=int, default=2, help="turns before those that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.quick:
        options.width, options.tokens, options.turns = [1024], [256], 3
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype, why = figures.dtype(options.dtype)
    formulas = compile_formulas()
    print(f"{', '.join(map(str, options.tokens))} tokens, {dtype}: {why}", flush=True)
    found = [
        figure
        for width in options.width
        for tokens in options.tokens
        for figure in measure(width, tokens, dtype, options)
    ]
    if not options.no_compile:
        found += measure_compiled(dtype, ["lora", "qdora"] if options.quick else options.methods)
    if options.json:
        settings = {
            "dtype": f"{str(dtype).removeprefix('torch.')} ({why})",
            "tokens": ", ".join(map(str, options.tokens)),
            "formulas": formulas,
        }
        figures.write(options.json, settings | {"turns": options.turns}, found)


if __name__ == "__main__":
    main()
