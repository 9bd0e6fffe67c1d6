"""Without padding: the same loss and gradients as each example gives by itself, or else the padding stays."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import phicore
from phicore import TrainConfig, Trainer
from phicore.training import loss, packing
from phicore.training.data import collate
from phicore.training.loss import causal_lm_loss
from phicore.training.recompute import checkpointed_blocks
from tests.training.small_run import SETTINGS, assert_same_run, examples, small_model, stop_after

Build = Callable[..., nn.Module]
Measure = Callable[[Tensor, Tensor], float]

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(family: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).to(dtype).eval()


def rows(lengths: list[int], seed: int = 0, labelled: float = 0.6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = torch.randint(3, 48, (n,), generator=generator)
        hidden = torch.rand(n, generator=generator) > labelled
        made.append({"input_ids": ids, "labels": ids.masked_fill(hidden, -100)})
    return made


LENGTHS = [5, 9, 1, 14, 2]


def batch(lengths: list[int] | None = None) -> dict[str, Tensor]:
    return collate(rows(lengths or LENGTHS), pad_id=0)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each loss was taken without padding. The loss goes on in float64 behind logits in float64."""
    done: list[bool] = []

    def watched(*arguments: Any) -> Any:
        row = packing.without_padding(*arguments)
        done.append(row is not None)
        return row

    monkeypatch.setattr(loss, "without_padding", watched)
    monkeypatch.setattr(loss, "chunk_elements", lambda _device: 0)
    return done


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(loss, "without_padding", lambda *_: None)


def result(model: nn.Module, data: dict[str, Tensor]) -> tuple[Tensor, int, Tensor]:
    """The loss, its count and its gradient in one vector."""
    model.zero_grad()
    value, count = causal_lm_loss(model, data)
    value.backward()
    return value.detach(), int(count), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def alone(model: nn.Module, lengths: list[int], **options: Any) -> tuple[Tensor, int, Tensor]:
    """The same of each example by itself, added up."""
    parts = [result(model, collate([row], pad_id=0)) for row in rows(lengths, **options)]
    return sum(p[0] for p in parts), sum(p[1] for p in parts), sum(p[2] for p in parts)  # type: ignore


# Gemma's norms are float32 in a float64 model, which turns differences of 1e-16 into 1e-8 here and there.
FAMILIES: list[tuple[str, dict[str, Any], float]] = [
    ("Llama", {}, 1e-10),
    ("Llama", {"hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": True}, 1e-10),
    ("Phi3", {"sliding_window": 14}, 1e-10),
    ("Phi", {}, 1e-10),
    ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}, 1e-10),
    ("Mistral", {"sliding_window": 15}, 1e-10),
    ("Qwen2", {}, 1e-10),
    ("Qwen3", {"head_dim": 8}, 1e-10),
    ("Olmo2", {}, 1e-10),
    ("Gemma", {"head_dim": 8}, 1e-6),
    ("Gemma3Text", {"head_dim": 8, "sliding_window": 20}, 1e-6),
    ("OPT", {"ffn_dim": 44, "word_embed_proj_dim": 32}, 1e-10),
    ("Mixtral", {"num_local_experts": 4, "experts_implementation": "eager"}, 1e-10),  # the others know no float64
    ("GPTBigCode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}, 1e-10),
]


@pytest.mark.parametrize(("family", "options", "tolerance"), FAMILIES, ids=lambda v: v if isinstance(v, str) else "")
def test_families(
    packed: list[bool], relative_error: Measure, family: str, options: dict[str, Any], tolerance: float
) -> None:
    if family == "GPT2":
        torch.manual_seed(0)
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=48, **options)).double().eval()
    else:
        model = build(family, **options)
    expected = alone(model, LENGTHS)
    packed.clear()
    value, count, gradient = result(model, batch())
    assert packed == [True]
    assert count == expected[1]
    assert value.item() == pytest.approx(expected[0].item(), rel=1e-6)  # the loss itself is float32
    assert relative_error(gradient, expected[2]) < tolerance


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("Llama")


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99), labelled=st.floats(0, 1))
def test_all_lengths(llama: Any, relative_error: Measure, lengths: list[int], seed: int, labelled: float) -> None:
    data = collate(rows(lengths, seed, labelled), pad_id=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "chunk_elements", lambda _device: 0)
        value, count, gradient = result(llama, data)
        expected = alone(llama, lengths, seed=seed, labelled=labelled)
    row = packing.without_padding(llama, ["input_ids", "attention_mask", "position_ids"], data)
    assert (row is None) == (min(lengths) == max(lengths))  # where there is padding it is left out
    assert row is None or row.input_ids.shape == (1, sum(lengths))
    assert count == expected[1]
    assert value.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert relative_error(gradient, expected[2]) < 1e-10


@pytest.mark.parametrize("quantized", [False, True], ids=["", "nf4"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters(
    packed: list[bool], relative_error: Measure, randomize: Callable[..., nn.Module], dora: bool, quantized: bool
) -> None:
    model = build("Llama", dtype=torch.float32)
    if quantized:
        phicore.quantize_(model)
    model.double()
    randomize(phicore.attach(model, phicore.LoRAConfig(rank=3, alpha=5.0, dora=dora, adapter_dtype=torch.float64)))
    expected = alone(model, LENGTHS)
    packed.clear()
    assert relative_error(result(model, batch())[2], expected[2]) < 1e-10
    assert packed == [True]


def test_rope_that_depends_on_the_longest_length(
    packed: list[bool], padded: Callable[[], None], relative_error: Measure
) -> None:
    """As in the padded batch: all examples have the RoPE of the longest."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = build("Llama", max_position_embeddings=8, rope_parameters=rope)
    given = result(model, batch())
    assert packed == [True]
    padded()
    expected = result(model, batch())
    assert relative_error(given[2], expected[2]) < 1e-10
    assert relative_error(given[2], alone(model, LENGTHS)[2]) > 1e-5  # which shows that it does depend


def test_only_tokens_before_labels_reach_the_head(
    llama: Any, monkeypatch: pytest.MonkeyPatch, packed: list[bool]
) -> None:
    seen: list[tuple[int, ...]] = []

    def watched(hidden: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(hidden.shape))
        return loss_of(hidden, *others)

    loss_of = loss.linear_cross_entropy
    monkeypatch.setattr(loss, "linear_cross_entropy", watched)
    _, count, _ = result(llama, batch())
    assert packed == [True]
    assert seen == [(count, 32)]


def test_evaluation(packed: list[bool], tmp_path: Path) -> None:
    model = build("Llama", dtype=torch.float32)
    trainer = Trainer(model, TrainConfig(output=str(tmp_path), steps=1, batch_size=2), rows(LENGTHS))
    given = trainer.evaluate(rows(LENGTHS))
    assert packed == [True]
    value, count, _ = alone(model, LENGTHS)
    assert given == pytest.approx(value.item() / count, rel=1e-5)


# ===== what runs around and inside the model =====


@pytest.mark.parametrize("kind", ["ours", "reentrant", "not reentrant"])
def test_gradient_checkpointing(packed: list[bool], relative_error: Measure, kind: str) -> None:
    """The blocks run again in the backward pass, when the loss is long done, and see the same mask."""
    model = build("Llama", attention_dropout=0.0).train()
    expected = alone(model, LENGTHS)
    packed.clear()
    if kind != "ours":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its name changes in version 6
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    with checkpointed_blocks(model) if kind == "ours" else nullcontext():
        given = result(model, batch())
    assert packed == [True]
    assert relative_error(given[2], expected[2]) < 1e-10


def test_attention_dropout_is_the_models(packed: list[bool]) -> None:
    model = build("Llama", attention_dropout=0.5)

    def value(seed: int) -> float:
        torch.manual_seed(seed)
        return float(causal_lm_loss(model, batch())[0].detach())

    quiet = value(1)
    assert quiet == value(2)
    model.train()
    assert value(1) == value(1)
    assert len({value(1), value(2), quiet}) == 3
    assert all(packed)


def test_autocast(packed: list[bool], padded: Callable[[], None], relative_error: Measure) -> None:
    model = build("Llama", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        given = result(model, batch())
        assert packed == [True]
        padded()
        expected = result(model, batch())
    assert relative_error(given[2], expected[2]) < 3e-2


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_under_ddp(packed: list[bool], relative_error: Measure) -> None:
    model = build("Llama")
    expected = alone(model, LENGTHS)
    packed.clear()
    given = result(DistributedDataParallel(model), batch())
    assert packed == [True]
    assert relative_error(given[2], expected[2]) < 1e-10


def test_a_run_goes_on_bit_for_bit(packed: list[bool], tmp_path: Path) -> None:
    def trainer(output: str, **options: Any) -> Trainer:
        model = phicore.attach(
            build("Llama", dtype=torch.float32, attention_dropout=0.2),
            phicore.LoRAConfig(rank=2, alpha=3.0, dropout=0.2, dora=True),
        )
        settings = {**SETTINGS, **options}
        return Trainer(model, TrainConfig(output=str(tmp_path / output), **settings), examples(vocabulary=48))

    trainer("whole").fit()
    with pytest.raises(SystemExit):
        stop_after(trainer("parts"), 3).fit()
    trainer("parts", resume=True).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert any(packed)


# ===== where the padding stays =====


def changed(**values: Any) -> dict[str, Tensor]:
    return {**batch(), **values}


def with_mask(change: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    data = batch()
    change(data["attention_mask"])
    return data


@pytest.mark.parametrize(
    "data",
    [
        with_mask(lambda mask: mask.copy_(mask.flip(1))),  # left
        with_mask(lambda mask: mask[3, 4].zero_()),  # a hole
        with_mask(lambda mask: mask[2].zero_()),  # nothing in a row
        with_mask(lambda mask: mask[:, 13].zero_()),  # no example as long as the batch
        with_mask(lambda mask: mask.fill_(1)),  # no padding
        changed(labels=torch.ones(5, 14, dtype=torch.int64)),  # labels on padding
        batch([5]),
    ],
)
def test_other_batches(packed: list[bool], llama: Any, data: dict[str, Tensor]) -> None:
    causal_lm_loss(llama, data)
    assert packed == [False]


def with_hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def with_norm(model: Any) -> None:
    model.model.other = nn.BatchNorm1d(3)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model.set_attn_implementation("eager"),
    "hook": with_hook,
    "batch norm": with_norm,
    "compiled": lambda model: model.model.layers[1].compile(backend="eager"),
    "encoder and decoder": lambda model: setattr(model.config, "is_encoder_decoder", True),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_models_in_another_state(packed: list[bool], change: str) -> None:
    model = build("Llama")
    causal_lm_loss(model, batch())
    CHANGES[change](model)
    with torch.no_grad():
        causal_lm_loss(model, batch())
    assert packed == [True, False]


def test_rows_of_other_adapters(packed: list[bool]) -> None:
    model = phicore.attach(build("Llama"), phicore.LoRAConfig(rank=2, alpha=3.0), name="a")
    with phicore.adapters.mixed(model, ["a", None, "a", None, "a"]):
        causal_lm_loss(model, batch())
    causal_lm_loss(model, batch())
    assert packed == [False, True]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Mistral", {"sliding_window": 13}),
        ("Gemma3Text", {"head_dim": 8, "sliding_window": 13}),
        ("Gemma2", {"head_dim": 8, "attn_implementation": "eager"}),  # which it takes to cap attention scores
        ("Bloom", {}),  # ALiBi
        ("Falcon", {"alibi": True}),
        ("Mamba", {}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_families(packed: list[bool], family: str, options: dict[str, Any]) -> None:
    model = build(family, dtype=torch.float32, **options)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        causal_lm_loss(model, batch())
    assert packed == [False]
    assert model not in packing._verdicts  # not even tried


def test_modules_that_are_no_model_of_transformers(packed: list[bool]) -> None:
    causal_lm_loss(small_model(), collate(examples(), pad_id=0))
    assert packed == [False]


# ===== what only the trial finds =====


class Mixing(transformers.LlamaForCausalLM):
    """Tokens meet outside attention."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        embedded = self.model.embed_tokens(input_ids)
        before = nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(
            inputs_embeds=embedded + 0.01 * before, attention_mask=attention_mask, position_ids=position_ids, **more
        )


class Counting(transformers.LlamaForCausalLM):
    """Positions are those in the row."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **more)


class Late(transformers.LlamaForCausalLM):
    """Beyond a place that the trial does not reach, it matters where in the row a token is."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        far = (torch.arange(input_ids.shape[1]) > 12).to(torch.float64)
        embedded = self.model.embed_tokens(input_ids) * (1 + far[:, None])
        return super().forward(inputs_embeds=embedded, attention_mask=attention_mask, position_ids=position_ids, **more)


class Masking(transformers.LlamaForCausalLM):
    """Does more with its mask."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask * 1, position_ids=position_ids, **more
        )


class MaskingWhileTraining(Masking):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        parent = super() if self.training else super(Masking, self)
        noise = torch.rand(1) if self.training else torch.zeros(1)  # a random number before the failure
        out = parent.forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
        out.logits = out.logits * (1 + noise)
        return out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Mixing, "its logits are .* apart"),
        (Counting, "counts the tokens"),
        (Late, "counts the tokens"),
        (Masking, "its mask goes through"),
        (MaskingWhileTraining, "its mask goes through"),
    ],
)
def test_models_that_read_more_than_an_example_keep_their_padding(
    packed: list[bool], padded: Callable[[], None], kind: Any, reason: str
) -> None:
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**SIZES, attention_dropout=0.3)).double().train()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"{kind.__name__} trains on padded batches: .*{reason}"):
        given = result(model, batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        again = result(model, batch())
    assert packed[-1] is False
    padded()
    torch.manual_seed(1)
    expected = result(model, batch())
    for found in (given, again):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[2], expected[2])
    assert all(module.training for module in model.modules())


def test_attention_to_the_future_keeps_its_padding(packed: list[bool]) -> None:
    with pytest.warns(UserWarning, match="logits are .* apart"):
        causal_lm_loss(build("Llama", is_causal=False), batch())
    assert packed == [False]


def test_temperatures_by_place_keep_their_padding(packed: list[bool]) -> None:
    """Llama 4 scales attention by a token's place in the row, from place 8192 on."""
    options = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 44, "num_hidden_layers": 4}
    with pytest.warns(UserWarning, match="counts the tokens"):
        causal_lm_loss(build("Llama4Text", **options), batch())
    assert packed == [False]


def test_the_trial_is_done_once_and_leaves_no_trace(packed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[Any] = []
    difference = packing._difference
    monkeypatch.setattr(packing, "_difference", lambda model: trials.append(model) or difference(model))
    model = build("Llama").train()
    state = torch.get_rng_state()
    causal_lm_loss(model, batch())
    assert torch.equal(torch.get_rng_state(), state)  # there is no dropout
    assert model.training
    causal_lm_loss(model, batch())
    assert len(trials) == 1
    phicore.attach(model, phicore.LoRAConfig(rank=2, alpha=3.0))
    for _ in range(2):
        causal_lm_loss(model, batch())
    assert len(trials) == 2  # there are other kinds of layers now
    assert packed == [True] * 4


def test_a_mask_says_what_it_cannot_do() -> None:
    mask = packing._Causal.of([2, 3])
    assert (tuple(mask.shape), mask.dtype, mask.dim(), len(mask.size())) == ((1, 1, 5, 5), torch.bool, 4, 4)
    q = torch.randn(1, 2, 5, 4)
    for use in (
        lambda: mask[:, :, :2],
        lambda: mask.to(torch.float32),
        lambda: mask + 1,
        lambda: torch.where(mask, 0, 1),
        lambda: q.masked_fill(mask, 0),
        lambda: nn.functional.scaled_dot_product_attention(q.repeat(2, 1, 1, 1), q, q, attn_mask=mask),
        lambda: nn.functional.scaled_dot_product_attention(q, q[:, :, :4], q[:, :, :4], attn_mask=mask),
    ):
        with pytest.raises(packing.NotSeparable):
            use()
