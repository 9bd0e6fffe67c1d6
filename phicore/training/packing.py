"""A batch without its padding: the examples end to end in one row, each attending to itself alone.

Linear layers, norms, activations and adapters work on each token by itself, so only two things tell an example where it
lies: its positions, which start again at each example, and the attention mask. The mask given here is no table but the
examples' lengths, as a tensor that torch's scaled_dot_product_attention answers with one causal product for each
example (sum n^2 pairs in place of B T^2, half of them skipped). It goes the way of any mask through a model of
transformers, also when gradient checkpointing runs a block again, and nothing of the model or the library is replaced.

A model is taken this way only where that is the same computation. Whatever else is done with the mask raises
(`_Causal`), windows and kinds of layers are read in the model's config, and a model's first batch is preceded by a
small trial that compares both ways. Everything else keeps its padding, and so does every batch on a GPU, where a
product for each example is a launch for each; nothing was measured there.
"""

import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from phicore.adapters.lora import LowRankLayer
from phicore.training.attention import attends_plainly, causal_attention
from phicore.training.encoding import IGNORE_INDEX
from phicore.training.modes import mode

KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Of layers, as configs of transformers name them: those where tokens meet in attention and nowhere else."""


class NotSeparable(Exception):
    """A model does more with its mask than give it to attention."""


@dataclass(frozen=True, slots=True)
class Row:
    """N tokens of a batch [B, T]: what its padding leaves.

    Attributes:
        input_ids: int64 [1, N].
        labels: int64 [1, N], of the token after each one of its example; -100 where there is none.
        inputs: attention_mask and position_ids [1, N], for the model.
    """

    input_ids: Tensor
    labels: Tensor
    inputs: dict[str, Tensor]


def without_padding(model: nn.Module, accepted: Iterable[str], batch: Mapping[str, Tensor]) -> Row | None:
    """The batch as one row, or None where it has no padding or the model must see it padded.

    Args:
        model: tried on a few tokens, in evaluation mode, when it is first seen and when kinds of modules have changed.
        accepted: names that its forward takes.
        batch: input_ids int64 [B, T], labels int64 [B, T], attention_mask int64 [B, T].
    """
    if not {"input_ids", "attention_mask", "position_ids"} <= set(accepted) or "attention_mask" not in batch:
        return None
    if batch["input_ids"].device.type != "cpu" or not _tokens_meet_in_attention_alone(model, batch):
        return None
    row = _row(batch["input_ids"], batch["attention_mask"], batch["labels"])
    return row if row is not None and _agrees(model) else None


def keep_padding(model: nn.Module, reason: str) -> None:
    """Lets a model see padded batches from now on, and says so."""
    _verdicts[model] = _kinds(model), False
    warnings.warn(f"{type(model).__name__} trains on padded batches: without padding, {reason}", stacklevel=4)


def _row(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Row | None:
    """None unless there is padding, on the right, without labels, and an example as long as the batch."""
    length = input_ids.shape[1]
    real = attention_mask != 0  # [B, T]
    lengths = real.sum(1)
    places = torch.arange(length, device=real.device).expand_as(real)
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # [B, T]
    padded_right = torch.equal(real, places < lengths[:, None]) and int(lengths.min()) > 0
    # RoPE may depend on the longest length (dynamic, longrope), which is the batch's only where an example fills it.
    if not padded_right or bool(real.all()) or int(lengths.max()) < length:
        return None
    if bool((following[~real] != IGNORE_INDEX).any()):
        return None
    inputs = {"attention_mask": _Causal.of(lengths.tolist()), "position_ids": places[real][None]}
    return Row(input_ids[real][None], following[real][None], inputs)


class _Causal(Tensor):
    """The causal mask of examples that lie end to end: bool [1, 1, N, N] to who looks, its lengths to attention.

    Raises:
        NotSeparable: by any other function of it.
    """

    lengths: list[int]

    @staticmethod
    def of(lengths: list[int]) -> "_Causal":
        n = sum(lengths)
        mask = torch.ones((), dtype=torch.bool, device="cpu").expand(1, 1, n, n).as_subclass(_Causal)  # takes no memory
        mask.lengths = lengths
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _KEEPS:  # as reentrant checkpointing does with what it is given; a mask has no gradient
            return args[0]
        raise NotSeparable(f"its mask goes through {getattr(func, '__name__', func)}")


_T: Any = Tensor  # whose attributes are descriptors to all but type checkers
_LOOKS = {
    _T.dim, _T.size, _T.is_floating_point, _T.shape.__get__, _T.ndim.__get__, _T.dtype.__get__, _T.device.__get__,
    _T.requires_grad.__get__,
}  # fmt: skip
_KEEPS = {_T.detach, _T.requires_grad.__set__}


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: _Causal,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention of each example. query [1, H, N, D], key and value [1, H', N, D]: [1, H, N, D]."""
    lengths = attn_mask.lengths
    if any(t.shape[0] != 1 or t.shape[2] != sum(lengths) for t in (query, key, value)):
        raise NotSeparable(f"attention is between {list(query.shape)} and {list(key.shape)}")
    attended = [
        causal_attention(q, k, v, scale)
        if not dropout_p and attends_plainly(q, k, v)
        else scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        for q, k, v in zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat([y.transpose(1, 2) for y in attended], 1).transpose(1, 2)  # as the CPU's kernel lays them out


def _tokens_meet_in_attention_alone(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether a model's parts and settings let each token depend on its own example and on nothing else of a batch."""
    transformers = sys.modules.get("transformers")  # imported by whoever made the model
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    config: Any = model.config.get_text_config()
    windows = (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
    return (
        getattr(model, "_supports_attention_backend", False)
        and config._attn_implementation == "sdpa"
        and not model.config.is_encoder_decoder
        and set(getattr(config, "layer_types", None) or ()) <= KINDS
        and all(window is None or window >= batch["input_ids"].shape[1] for window in windows)
        and not torch.compiler.is_compiling()
        and not any(map(_knows_rows, model.modules()))
    )


def _knows_rows(module: nn.Module) -> bool:
    """Whether a module may work on a batch's rows rather than its tokens, or is compiled for their shapes."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return (
        isinstance(module, _NormBase)
        or (isinstance(module, LowRankLayer) and module.rows is not None)
        # That one is transformers' own, for gradient checkpointing.
        or any(getattr(hook, "__name__", "") != "make_inputs_require_grads" for hook in hooks)
        or module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
    )


# Whether a model gives without padding what it gives with it, and of which kinds of modules that was found.
_verdicts: weakref.WeakKeyDictionary[nn.Module, tuple[frozenset[type], bool]] = weakref.WeakKeyDictionary()


def _kinds(model: nn.Module) -> frozenset[type]:
    return frozenset(map(type, model.modules()))


def _agrees(model: Any) -> bool:
    known = _verdicts.get(model)
    if known is not None and known[0] == _kinds(model):
        return known[1]
    try:
        apart, bound = _difference(model)
    except Exception as error:
        keep_padding(model, f"{type(error).__name__}: {error}")
        return False
    if not apart <= bound:
        keep_padding(model, f"its logits are {apart:.1g} apart, relatively")
        return False
    _verdicts[model] = _kinds(model), True
    return True


class _NoPlaces(TorchFunctionMode):
    """Lets no one count the tokens of a row: places have been given, and start again at each example."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.arange and self.tokens in (*args, *(kwargs or {}).values()):
            raise NotSeparable("it counts the tokens of a row")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _difference(model: Any) -> tuple[float, float]:
    """How far a model's logits with and without padding lie apart, relative to their size, and what rounding allows.

    Three examples of random tokens, of which the second sees another before it and the third is one token.
    """
    lengths = torch.tensor([3, 7, 1], device="cpu")  # 11 tokens, a number that no width has
    real = torch.arange(7, device="cpu") < lengths[:, None]  # [3, 7]
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, real.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    row = _row(ids, real.long(), torch.full_like(ids, IGNORE_INDEX))
    assert row is not None
    with mode(model, training=False), torch.random.fork_rng([]):
        padded = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[real]  # [11, V]
        with _NoPlaces(row.input_ids.shape[1]):
            packed = model(input_ids=row.input_ids, **row.inputs, use_cache=False).logits[0]
    dtypes = {padded.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    if torch.is_autocast_enabled("cpu"):
        dtypes.add(torch.get_autocast_dtype("cpu"))
    bound = max(1e-4, 4 * max(torch.finfo(dtype).eps for dtype in dtypes))
    sizes = real.sum(1).tolist()
    parts = zip(packed.double().split(sizes), padded.double().split(sizes), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in parts), bound
