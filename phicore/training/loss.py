"""The loss of a causal language model, as a sum and a count: whoever sums over batches and ranks divides once."""

import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from phicore.modules import unwrap
from phicore.training.batches import TOKENS, kind_of
from phicore.training.cross_entropy import chunk_elements, linear_cross_entropy
from phicore.training.encoding import IGNORE_INDEX
from phicore.training.packing import NotSeparable, keep_padding, without_padding


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy over the labelled tokens.

    Where the model's logits are what an nn.Linear gives and they would be many, the loss is taken in the head's place,
    a few rows at a time, and the logits never exist as a whole (see `in_place_of_head`). Where a model of transformers
    allows it, padding is left out (see `phicore.training.packing`). A mixture of experts that is asked for its routers'
    logits (config.output_router_logits) has its balancing loss added for each labelled token, as in transformers.

    Args:
        model: called with input_ids (by position, unless its forward names it) and, where its forward takes them,
            attention_mask, use_cache=False and logits_to_keep; returns logits [B, T, V] or an object with `.logits`.
            Without padding, B = 1 and T is the number of tokens, and it is given position_ids.
        batch: input_ids int64 [B, T], labels int64 [B, T] (-100 where no loss), attention_mask int64 [B, T].

    Returns:
        The summed loss, float32 [], and the number of labelled tokens, int64 [].

    Raises:
        TypeError: the model returns something else; input_ids or labels are no tensors.
        ValueError: the batch lacks input_ids or labels, or has what the model takes and is not given here; a balancing
            loss comes without its factor.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    bare: Any = unwrap(model)
    accepted = inspect.signature(bare.forward).parameters  # that of a wrapper takes, and hands on, anything
    _check_batch(batch, type(bare).__name__, accepted)
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]  # position t predicts the label at t + 1: [B, T - 1]
    inputs: dict[str, Any] = {}
    row = without_padding(inner, accepted, batch)
    if row is not None:
        ids, labels, inputs = row.input_ids, row.labels, dict(row.inputs)  # [1, N]
    elif "attention_mask" in accepted and "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    # The output head is a fifth of a small model's work: it runs only where some row of the batch has a label.
    positions = (labels != IGNORE_INDEX).any(0).nonzero().squeeze(1)  # [K]
    targets = labels[:, positions].reshape(-1)  # [B * K]
    chosen = "logits_to_keep" in accepted  # by the model itself, before its head
    if _takes_use_cache(bare, accepted):
        inputs["use_cache"] = False
    if chosen:
        inputs["logits_to_keep"] = positions

    def run() -> Tensor:
        if "input_ids" in accepted:
            output = model(input_ids=ids, **inputs)
        else:
            output = model(ids, **inputs)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{type(bare).__name__} returns {kind_of(output)}; causal_lm_loss takes logits as a tensor or as an "
                f"object with .logits. Have its forward return these (transformers: config.return_dict = True), or "
                f"give the Trainer a loss_fn"
            )
        balance[:] = _balancing_loss(bare, output)
        return logits

    def of_hidden(head: nn.Linear, hidden: Tensor) -> Tensor | None:
        """The loss from the head's input, or None where that is not the input that the targets belong to."""
        length = len(positions) if chosen else ids.shape[1]
        if hidden.shape[:-1] != (len(labels), length) or (len(targets) and int(targets.max()) >= head.out_features):
            return None
        if targets.numel() * head.out_features <= chunk_elements(hidden.device):
            return None  # as many as a chunk would hold
        rows = (hidden if chosen else hidden[:, positions]).flatten(0, 1)  # [B * K, in]
        return linear_cross_entropy(rows, head.weight, head.bias, targets)

    count = (targets != IGNORE_INDEX).sum()
    balance: list[Tensor] = []  # of the run that counts, which is the last
    state = torch.get_rng_state()
    try:
        found = in_place_of_head(inner, run, of_hidden)
    except NotSeparable as reason:
        keep_padding(inner, str(reason))
        torch.set_rng_state(state)
        return causal_lm_loss(model, batch)
    if found.dim() == 0:
        loss = found.float()
    else:
        if not chosen:
            found = found[:, positions]  # [B, T, V] -> [B, K, V]
        loss = nn.functional.cross_entropy(
            found.reshape(-1, found.shape[-1]).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
        )
    for term in balance:
        loss = loss + count * term
    return loss, count


def _check_batch(batch: Any, model: str, accepted: Mapping[str, object]) -> None:
    """Raises what `causal_lm_loss` does for a batch that it cannot use, or not whole; accepted are the names that the
    model's forward takes."""
    if not isinstance(batch, Mapping) or not {*TOKENS} <= batch.keys():
        raise ValueError(
            f"causal_lm_loss needs a batch with input_ids and labels, got {kind_of(batch)}; give examples both "
            f"(labels are a copy of input_ids, with {IGNORE_INDEX} where no loss is wanted), or the Trainer a loss_fn"
        )
    others = batch.keys() - {*TOKENS, "attention_mask"}
    for key in TOKENS:
        if not isinstance(batch[key], Tensor):
            raise TypeError(
                f"{key} of the batch is a {type(batch[key]).__name__}, and causal_lm_loss needs a tensor. Lists become "
                f"one in examples of nothing but input_ids, labels and attention_mask: take other keys out of them "
                f"(here {', '.join(sorted(others)) or 'none'}), make them tensors, or give the Trainer a collate_fn"
            )
    if passed_over := sorted(others & accepted.keys()):
        raise ValueError(
            f"the batch has {', '.join(passed_over)}, which {model} takes and causal_lm_loss does not give it; take "
            f"that out of the examples, or give the Trainer a loss_fn that passes it on"
        )


def _balancing_loss(model: Any, output: Any) -> list[Tensor]:
    """What a mixture of experts adds to its mean loss where transformers is given labels; none of most models."""
    aux = getattr(output, "aux_loss", None)
    if not isinstance(aux, Tensor):
        return []
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (model, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if (factor := getattr(holder, name, None)) is not None:
                return [factor * aux.float()]
    raise ValueError(
        f"{type(model).__name__} returns an aux_loss, and neither it nor its config has the router_aux_loss_coef that "
        f"it is to be weighed with; give it one, set config.output_router_logits = False, or give the Trainer a loss_fn"
    )


def _takes_use_cache(model: Any, accepted: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a model can be told to keep no keys and values: by its forward, or by that of the model in it, to which
    it hands on what it does not name (GraniteMoe). A cache would be filled twice where blocks are recomputed."""
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    within = inspect.signature(getattr(model, "base_model", model).forward).parameters if hands_on else {}
    return "use_cache" in accepted or "use_cache" in within


# Models whose logits turned out not to be what their head gives.
_changes_logits: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def in_place_of_head(
    model: nn.Module, run: Callable[[], Tensor], of_hidden: Callable[[nn.Linear, Tensor], Tensor | None]
) -> Tensor:
    """What of_hidden gives for the input of the model's output head, if the model's logits are that head's output.

    While the model runs, its head answers with a stand-in of the logits' shape that holds only the loss. If run()
    returns that very object, unwritten, then nothing was done to the logits behind the head, and the loss is theirs.
    A model that scales or caps its logits (Gemma, Cohere, Granite) returns another tensor; so it is run again from the
    same random state, this time with its head, and from then on with its head at once. Heads that are not plain
    nn.Linear (adapted, quantized, hooked) are left alone from the start.

    Args:
        model: whose head it is.
        run: runs the model; returns its logits [..., V].
        of_hidden: maps the head and its input to a loss [], or to None to let the head run.

    Returns:
        The loss [], or the logits [..., V].
    """
    head: Any = output_head(model)
    if head is None or model in _changes_logits:
        return run()
    stand_ins: list[tuple[Tensor, Tensor, int]] = []  # loss, the same as logits, version: how often it was written to

    def forward(hidden: Tensor) -> Tensor:
        loss = of_hidden(head, hidden)
        if loss is None:
            return nn.functional.linear(hidden, head.weight, head.bias)
        as_logits = loss.expand(*hidden.shape[:-1], head.out_features)  # takes no memory
        stand_ins.append((loss, as_logits, as_logits._version))
        return as_logits

    cuda = [head.weight.device] if head.weight.device.type == "cuda" else []
    random_states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in cuda]
    head.forward = forward
    try:
        logits = run()
    except Exception:
        if not stand_ins:
            raise
        logits = None  # a model that cannot go on with the stand-in says nothing about its own run
    finally:
        del head.forward
    if not stand_ins:
        assert logits is not None
        return logits
    loss, as_logits, version = stand_ins[0]
    if len(stand_ins) == 1 and logits is as_logits and as_logits._version == version:
        return loss
    _changes_logits.add(model)
    torch.set_rng_state(random_states[0])
    for device, state in zip(cuda, random_states[1], strict=True):
        torch.cuda.set_rng_state(state, device)
    return run()


def output_head(model: nn.Module) -> nn.Linear | None:
    """The layer whose output may be a model's logits: what get_output_embeddings says, or else the last nn.Linear.

    None where another forward could not stand in for its own without notice: the head is no plain nn.Linear, or has
    hooks that see its output; the model is compiled, or has norms whose running means a second run would move.
    """
    ask: Any = getattr(model, "get_output_embeddings", None)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = ask() if ask is not None else linears[-1] if linears else None
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    watched = (
        head._forward_hooks, head._backward_hooks, head._backward_pre_hooks, hooks._global_forward_hooks,
        hooks._global_backward_hooks, hooks._global_backward_pre_hooks,
    )  # fmt: skip
    compiled = hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in (model, head))
    if any(watched) or compiled or any(isinstance(m, _NormBase) for m in model.modules()):
        return None
    return head


def sum_and_count(returned: Any) -> tuple[Tensor, float]:
    """What a loss function returned, if it is what the loop needs of one.

    Raises:
        TypeError: it is something else, such as the mean loss alone, or that and the model's output.
        ValueError: the count is negative or not finite.
    """
    pair: tuple[Any, Any] = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
    loss, n = pair
    if not (_is_scalar(loss) and (_is_scalar(n) or isinstance(n, Real))):
        told = f"tuple of {', '.join(map(kind_of, returned))}" if isinstance(returned, tuple) else kind_of(returned)
        raise TypeError(
            f"loss_fn returned a {told}; it must return two values: the loss summed over the batch, a tensor of "
            f"one element, and the number of tokens (or items) that it sums over. Of a mean over n: return loss * n, n"
        )
    if not 0 <= (count := float(n)) < math.inf:
        raise ValueError(f"loss_fn counted {count} tokens (or items); a count is finite and at least 0")
    return loss, count


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def masked_mean(total: float, count: float, where: str) -> float:
    """total / count, refusing a batch without a single labelled token."""
    if count == 0:
        raise ValueError(
            f"{where}: no token carries loss; are the examples cut off before the answer? Raise the sequence length"
        )
    return total / count
