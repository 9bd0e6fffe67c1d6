"""Optimizers that mix elements are refused with the reason; the others are not."""

import pytest
import torch
from torch import nn

import phicore


class TrustRatio(torch.optim.AdamW):
    """As LAMB does: scales a parameter's update by its norm."""

    def step(self, closure=None):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step()
        with torch.no_grad():
            for old, p in zip(before, self.param_groups[0]["params"], strict=True):
                p.copy_(old + (p - old) * old.norm())


class Blockwise(torch.optim.SGD):
    """As 8-bit optimizers do: rounds gradients to a scale shared by 256 elements of a parameter."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.numel() >= 4096:
                for block in p.grad.view(-1).split(256):
                    scale = block.abs().max() / 127
                    block.copy_((block / scale).round() * scale)
        super().step()


CASES = [
    (torch.optim.LBFGS, {}, "LBFGS is not element-wise: its direction and line search need the whole gradient"),
    (torch.optim.Adafactor, {}, "Adafactor is not element-wise: it shares second moments"),
    (torch.optim.Muon, {}, "Muon is not element-wise: it orthogonalises"),
    (torch.optim.SparseAdam, {}, "SparseAdam is not element-wise: it takes sparse gradients"),
    (TrustRatio, {"lr": 0.0}, "TrustRatio is not element-wise: in 3 steps"),
    (Blockwise, {"lr": 0.1}, "Blockwise is not element-wise: in 3 steps"),
    (torch.optim.AdamW, {"lr": -1.0, "eps": -1.0}, "Invalid learning rate: -1"),
]


@pytest.mark.parametrize(("optimizer_class", "options", "message"), CASES, ids=[case[0].__name__ for case in CASES])
def test_refused_with_the_reason(optimizer_class, options, message):
    model = nn.Linear(3, 2)
    before = model.weight.data_ptr()
    with pytest.raises(ValueError, match=message):
        phicore.ZeroOptimizer(model.named_parameters(), optimizer_class, **options)
    assert model.weight.data_ptr() == before


def test_options_with_which_an_optimizer_runs_nowhere_are_not_put_down_to_pieces():
    """Its own words, and no advice to take what it is."""
    with pytest.raises(
        ValueError, match=r"AdamW\(differentiable=True\) does not run on a 96 x 100 matrix on cpu: a leaf"
    ) as e:
        phicore.ZeroOptimizer(nn.Linear(3, 2).named_parameters(), torch.optim.AdamW, differentiable=True)
    assert "element-wise" not in str(e.value)


ELEMENTWISE = ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_element_wise_optimizer_of_torch_is_accepted(name):
    model = nn.Linear(3, 2)
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), getattr(torch.optim, name))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_no_optimizer_of_torch_is_forgotten():
    theirs = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert theirs == {*ELEMENTWISE, "Adafactor", "LBFGS", "Muon", "SparseAdam"}


@pytest.mark.parametrize(("options", "error"), [({"bogus": 1}, TypeError), ({"betas": (1.5, 0.9)}, ValueError)])
def test_what_an_optimizer_says_of_its_options_is_passed_on(options, error):
    with pytest.raises(error, match=r"bogus|Invalid beta") as raised:
        phicore.ZeroOptimizer([("a", nn.Parameter(torch.ones(3)))], torch.optim.AdamW, **options)
    assert "element-wise" not in str(raised.value)
