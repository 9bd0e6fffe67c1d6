"""What several test files share: one thread, seeds, small models, and two ways of saying "nothing changed"."""

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

torch.set_num_threads(1)

# PHICORE_EXAMPLES=2000 looks deeper, at other examples each time.
examples = int(os.environ.get("PHICORE_EXAMPLES", "30"))
hypothesis.settings.register_profile("phicore", deadline=None, derandomize=examples == 30, max_examples=examples)
hypothesis.settings.load_profile("phicore")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """||given - exact|| / ||exact|| in float64; the difference itself where exact is zero or empty."""

    def measure(given: Tensor, exact: Tensor) -> float:
        assert given.shape == exact.shape
        given, exact = given.detach().double(), exact.detach().double()
        assert given.isfinite().all()
        norm = float(exact.norm())
        return float((given - exact).norm()) / (norm or 1.0)

    return measure


@pytest.fixture(scope="session")
def deepspeed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the real DeepSpeed trained and saved: a directory for each of tests.formats.deepspeed_runs.RUNS. It takes
    half a minute, so pytest's workers share one."""
    from tests.formats.deepspeed_runs import WORLD_SIZE

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory, done = shared / "deepspeed", shared / "deepspeed-done"
    with FileLock(shared / "deepspeed.lock"):
        if not done.exists():
            directory.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "tests.formats.deepspeed_runs", str(directory), str(WORLD_SIZE)]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
            run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
            done.touch()
    return directory


@pytest.fixture(scope="session")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """A context in which a module's formulas run as machine code: with machine_code(module, "NAME", ...). Compiling
    takes some 15 s each, so pytest's workers share what one of them compiles, all in one process."""
    from phicore.native import Formula

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @contextlib.contextmanager
    def within(module: Any, *names: str) -> Iterator[None]:
        directory = shared / f"machine-code-{module.__name__}"
        olds = [getattr(module, name) for name in names]
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                (directory / "phicore").mkdir(mode=0o700, parents=True)
                files = [word for old in olds for word in (old.name, str(directory / "phicore" / old.file()))]
                # Not in the background: the tests wait for it, and on a busy machine nice(19) takes ten times as long.
                code = "import os, sys; os.nice = abs; from phicore.native import main; main(*sys.argv[1:])"
                subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=600)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, XDG_CACHE_HOME=str(directory)))
            for name, old in zip(names, olds, strict=True):
                formula = Formula(old.name, old.function, old.examples, old.dynamic, old.pays)
                assert formula.ready(0), f"{old.name} was compiled, and does not load"
                stack.enter_context(mock.patch.object(module, name, formula))
            yield

    return within


@pytest.fixture(scope="session")
def unchanged() -> Callable[[nn.Module], contextlib.AbstractContextManager[None]]:
    """A context in which a model must keep its modules (the very objects), tensors and requires_grad flags."""

    def state(model: nn.Module) -> dict[str, Any]:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {
            "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
            "training": [module.training for module in model.modules()],
            "tensors": [(name, id(t), t.dtype, t.shape, t.requires_grad) for name, t in named],
            "bytes": [t.detach().contiguous().view(-1).view(torch.uint8).clone() for _, t in named if not t.is_meta],
        }

    @contextlib.contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = state(model)
        yield
        after = state(model)
        assert all(torch.equal(a, b) for a, b in zip(before.pop("bytes"), after.pop("bytes"), strict=True))
        assert before == after

    return check


class Block(nn.Module):
    """A residual block with odd sizes, a bias here and none there."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Toy(nn.Module):
    """embed -> blocks (the last is the first again if shared) -> norm -> head; float [..., 10] -> [..., 7]."""

    def __init__(self, *, width: int = 20, hidden: int = 33, shared: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(10, width)
        self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(2)])
        if shared:
            self.blocks.append(self.blocks[0])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ConvToy(nn.Module):
    """Token ids [B, T] -> .logits [B, T', 7], through an embedding and convolutions of one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 8)
        self.conv1 = nn.Conv1d(8, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=1, bias=False)
        self.head = nn.Linear(24, 7)

    def forward(self, input_ids: Tensor) -> Any:
        x = torch.tanh(self.conv1(self.embed(input_ids).mT))  # [B, 12, T]
        x = torch.tanh(self.conv2(x.unsqueeze(1)))  # [B, 4, 6, T']
        return SimpleNamespace(logits=self.head(x.flatten(1, 2).mT))


@pytest.fixture(scope="session")
def toy() -> Callable[..., nn.Module]:
    """Builds a Toy with weights of a seed: toy(shared=False, dtype=torch.float64, seed=0)."""

    def build(*, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Toy(**options).to(dtype)

    return build


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """Builds a transformers model of hidden size 32 and 2 layers, or a ConvToy: tiny("llama", tied=False)."""
    import transformers  # here, so that tests without a model start fast

    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 32}
    fewer = {"num_key_value_heads": 2}
    no_ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def build(
        family: str, *, tied: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any
    ) -> nn.Module:
        options = {**sizes, **heads, **no_ids, "tie_word_embeddings": tied, **more}
        if family == "conv":
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return ConvToy().to(dtype).eval()
        if family == "tied llama":
            return build("llama", tied=True, dtype=dtype, seed=seed, **more)
        if family == "llama":
            config, kind = transformers.LlamaConfig(**options, **fewer), transformers.LlamaForCausalLM
        elif family == "phi3":
            config, kind = transformers.Phi3Config(**options, **fewer), transformers.Phi3ForCausalLM
        elif family == "bert":
            config, kind = transformers.BertConfig(**options, num_labels=3), transformers.BertForSequenceClassification
        elif family == "gpt2":
            config, kind = (
                transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32, **no_ids),
                transformers.GPT2LMHeadModel,
            )
        elif family == "mixtral":
            config = transformers.MixtralConfig(**options, **fewer, num_local_experts=4)
            config._experts_implementation = "eager"  # the others know no float64
            kind = transformers.MixtralForCausalLM
        elif family == "gpt-oss":
            more_options = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
            config = transformers.GptOssConfig(**options, **fewer, **more_options, layer_types=["full_attention"] * 2)
            config._experts_implementation, kind = "eager", transformers.GptOssForCausalLM
        elif family == "t5":
            t5_options = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4}
            config = transformers.T5Config(**t5_options, pad_token_id=0, decoder_start_token_id=0)
            kind = transformers.T5ForConditionalGeneration
        elif family == "mamba":
            mamba_options = {"vocab_size": 48, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
            config, kind = transformers.MambaConfig(**mamba_options), transformers.MambaForCausalLM
        else:
            raise ValueError(family)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return kind(config).to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def randomize() -> Callable[..., nn.Module]:
    """Moves trainable parameters (B above all, which starts at zero) to values of a seed, by their size."""

    def fill(module: nn.Module, *, std: float = 0.3, seed: int = 1) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((std * noise).to(parameter.dtype))
        return module

    return fill


@pytest.fixture(scope="session")
def layer_of(randomize: Callable[..., nn.Module]) -> Callable[..., tuple[nn.Module, Tensor, Tensor | None]]:
    """Builds a layer to adapt, and in float64 the weight and bias that it amounts to by the papers' formulas.

    layer_of("nf4", 23, 37, bias=False) or a stack, outermost first: layer_of("dora+lora+linear", 23, 37).
    """
    import phicore

    def build(
        kind: str, out: int, inner: int, *, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[nn.Module, Tensor, Tensor | None]:
        outer, _, rest = kind.partition("+")
        if not rest:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                layer: Any = nn.Linear(inner, out, bias=bias)
            if kind == "nf4":
                layer = phicore.NF4Linear.from_linear(layer).to(dtype)
                weight = layer.nf4.dequantize(torch.float64)
            else:
                layer = layer.to(dtype)
                weight = layer.weight.detach().to(torch.float64, copy=True)
            return layer, weight, layer.bias.detach().to(torch.float64, copy=True) if bias else None
        base, weight, b = build(rest, out, inner, bias=bias, dtype=dtype, seed=seed)
        layer = {"lora": phicore.LoRALinear, "dora": phicore.DoRALinear}[outer](base, rank=3, alpha=5.0)
        randomize(layer, seed=seed + 7)
        direction = weight + 5.0 / 3 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        if outer == "lora":
            return layer, direction, b
        norm = (direction**2).sum(dim=1).sqrt()
        return layer, layer.magnitude.detach().double()[:, None] * direction / norm[:, None], b

    return build


@pytest.fixture(scope="session")
def saved_for_backward() -> Callable[[Callable[[], Tensor], nn.Module], list[Tensor]]:
    """The tensors that a computation keeps for its backward pass, without those of a module: one for each storage."""

    def record(compute: Callable[[], Tensor], module: nn.Module) -> list[Tensor]:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = compute()  # held, so that no storage is freed and used again meanwhile
        own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        del output
        return [tensor for pointer, tensor in kept.items() if pointer not in own]

    return record


@pytest.fixture(scope="session")
def most_held() -> Callable[[Callable[[], object]], int]:
    """The most bytes of tensors on the CPU that a call has at one moment, beyond those there were."""

    def measure(call: Callable[[], object]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda e: e[0])
        return max(accumulate((size for _, size in changes), initial=0))

    return measure


@pytest.fixture
def check_one_graph() -> Callable[..., None]:
    """Compiles a copy of a model as one graph and compares its output and gradients with the model's own."""

    def check(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        torch._dynamo.reset()
        copied = copy.deepcopy(model)
        compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
        y, z = model(*args, **kwargs), compiled(*args, **kwargs)
        torch.testing.assert_close(z, y)
        y.sum().backward()
        z.sum().backward()
        for (name, p), q in zip(model.named_parameters(), copied.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")

    return check
