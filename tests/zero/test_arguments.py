"""Arguments of ZeroOptimizer that it does not take, and descriptions of those that it does."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import phicore
from phicore.zero import groups
from tests.zero.models import parameters, sgd

BAD_CHOICES = [
    ({"stage": 3}, "stage must be 1 (split the state) or 2 (and the gradients), got 3"),
    ({"stage": True}, "(and the gradients), got True"),
    ({"stage": "2"}, "(and the gradients), got '2'"),
    ({"reduction": "avg"}, 'reduction must be "mean" or "sum", got \'avg\''),
    ({"bucket_bytes": 0}, "bucket_bytes must be a whole number above 0, such as 25 * 2**20, got 0"),
    ({"bucket_bytes": -1}, "25 * 2**20, got -1"),
    ({"bucket_bytes": 1e6}, "25 * 2**20, got 1000000.0"),
    ({"bucket_bytes": "25MB"}, "25 * 2**20, got '25MB'"),
    ({"bucket_bytes": None}, "25 * 2**20, got None"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CHOICES)
def test_a_choice_that_there_is_not_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        phicore.ZeroOptimizer(parameters((3,)).items(), torch.optim.SGD, **options)


NO_CLASSES = [
    (torch.optim.AdamW([nn.Parameter(torch.ones(1))]), "got an object of AdamW"),
    ("AdamW", "got an object of str"),
    (lambda params: torch.optim.AdamW(params), "got an object of function"),
    (nn.Linear, "got the class Linear"),
]


@pytest.mark.parametrize(("given", "message"), NO_CLASSES, ids=["instance", "name", "function", "another class"])
def test_what_is_no_class_of_optimizers_is_named(given, message):
    with pytest.raises(TypeError, match=f"must be a class of torch optimizers, such as torch.optim.AdamW.*{message}"):
        phicore.ZeroOptimizer(parameters((3,)).items(), given, lr=0.1)


def test_parameters_in_no_form_that_there_is_are_named():
    model = nn.Linear(3, 2)
    consumed = model.named_parameters()
    list(consumed)
    for given, message in (
        (consumed, "no parameters; if they are a generator"),
        ("weight", "the parameters must be .*, got str"),
        (model, "the parameters must be .*, got Linear"),
        (dict(model.named_parameters()), "the parameters must be .*, got dict"),
        ([{"params": model.weight}], "parameter group 0 must be .*, got Parameter"),
        ([{"params": []}, ("weight", model.weight)], "expected a parameter group .*, got tuple"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            phicore.ZeroOptimizer(given, torch.optim.SGD, lr=0.1)
    optimizer = sgd(parameters((3,)))
    with pytest.raises(TypeError, match=r"expected a parameter group .*, got tuple"):
        optimizer.add_param_group(("weight", model.weight))


def outside_the_group() -> str:
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        sgd(parameters((3,)), process_group=group)
        return ""
    with pytest.raises(ValueError, match="process_group") as error:
        sgd(parameters((3,)), process_group=group)
    return str(error.value)


def test_a_rank_outside_the_process_group_is_told_so(ranks):
    assert ["this rank is not in process_group" in text for text in ranks(2)(outside_the_group)] == [False, True]


def taken_from(parameters):
    yield from parameters
    raise OSError("the reader's own error")


def bad_on_one_rank(kind: str) -> str:
    given: Any = list(parameters((3,), (5,)).items())
    optimizer_class: Any = torch.optim.SGD
    options: dict[str, Any] = {}
    if dist.get_rank() == 1:
        if kind == "generator":
            given = taken_from(given)
        elif kind == "class":
            optimizer_class = "SGD"
        elif kind == "stage":
            options["stage"] = 3
        elif kind == "bytes":
            options["bucket_bytes"] = 0
        if kind == "none":
            given[1] = ("b", None)
        elif kind == "computed":
            given[1] = ("b", given[1][1] * 2)
        elif kind == "group":
            given = [{"lr": 0.1}]
    try:
        phicore.ZeroOptimizer(given, optimizer_class, lr=0.1, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "b is a NoneType"),
        ("computed", "b was computed"),
        ("group", 'parameter group 0 has no "params"'),
        ("generator", "the reader's own error"),
        ("class", "optimizer_class must be a class of torch optimizers"),
        ("stage", "stage must be 1"),
        ("bytes", "bucket_bytes must be a whole number"),
    ],
)
def test_an_argument_that_is_bad_on_one_rank_is_named_on_all(ranks, kind, message):
    assert all(message in text for text in ranks(2)(bad_on_one_rank, kind))


def test_a_setting_without_a_text_of_its_own_is_compared_by_its_kind():
    class Schedule:
        pass

    assert groups.shown({"schedule": Schedule(), "lr": torch.tensor(0.5)}) == (
        "lr=0.5, schedule=test_a_setting_without_a_text_of_its_own_is_compared_by_its_kind.<locals>.Schedule"
    )
