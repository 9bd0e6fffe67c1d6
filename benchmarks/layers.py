"""Step time and saved bytes of LoRA, DoRA, QLoRA and QDoRA layers beside PEFT's (over bitsandbytes for the last two).

A step is the forward and the backward pass of one linear layer, gradients to x and to the adapter. Each line is a
ratio of alternating pairs in this process, with PEFT's layer against itself as the noise.

    python -m benchmarks.layers [--dtype bfloat16] [--width 2048] [--tokens 512] [--rank 16 128] [--pairs 15]
"""

import argparse
import platform
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import phicore
from benchmarks.pairs import compare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METHODS = ("lora", "dora", "qlora", "qdora")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype, width = DTYPES[options.dtype], options.width
    print(
        f"{width} x {width}, {options.tokens} tokens, {options.dtype}, {options.threads} threads, "
        f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    )
    weight = torch.randn(width, width).div(width**0.5).to(dtype)
    x = torch.randn(options.tokens, width, dtype=dtype, requires_grad=True)
    grad = torch.randn(options.tokens, width, dtype=dtype)
    bases = {False: linear(weight), True: phicore.NF4Linear.from_linear(linear(weight))}
    print("method  rank  dropout  / peft                                    / frozen base  saved bytes (peft)")
    for method in options.methods:
        for rank in options.rank:
            for dropout in options.dropout:
                ours, peer = (make(method, weight, rank, dropout) for make in (our_layer, peft_layer))
                run = step(ours, x, grad)
                to_peer = compare(run, step(peer, x, grad), options.pairs)
                to_base = compare(run, step(bases[method.startswith("q")], x, grad), options.pairs)
                print(
                    f"{method:6}  {rank:4}  {dropout:7}  {to_peer!s:40}  {to_base.ratio:13.3f}  "
                    f"{saved_bytes(ours, x):,} ({saved_bytes(peer, x):,})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
