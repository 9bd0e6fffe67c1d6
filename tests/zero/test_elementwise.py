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


class SharedStep(torch.optim.SGD):
    """As Prodigy does: all that an optimizer holds has one step size, which grows with the way that it has gone."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                way = 0.0
                for p in group["params"]:
                    self.state[p].setdefault("start", p.detach().clone())
                    way += float(torch.dot(p.grad.flatten(), (self.state[p]["start"] - p).flatten()))
                group["size"] = max(group.get("size", 1e-6), way / 1e2)
                for p in group["params"]:
                    p.sub_(p.grad.sign() * group["lr"] * group["size"])


class Keeping(torch.optim.SGD):
    """Keeps a state of each parameter, or of none."""

    def __init__(self, params, lr=0.1, keep=lambda p: 1, of_parameter=True):
        super().__init__(params, lr=lr)
        self.keep, self.of_parameter = keep, of_parameter

    def step(self, closure=None):
        super().step()
        if not self.of_parameter:
            self.state["all"] = {"steps": 1}
        for p in self.param_groups[0]["params"] if self.of_parameter else ():
            self.state[p]["kept"] = self.keep(p)


CASES = [
    (torch.optim.LBFGS, {}, "LBFGS is not element-wise: its direction and line search need the whole gradient"),
    (torch.optim.Adafactor, {}, "Adafactor is not element-wise: it shares second moments"),
    (torch.optim.Muon, {}, "Muon is not element-wise: it orthogonalises"),
    (torch.optim.SparseAdam, {}, "SparseAdam is not element-wise: it takes sparse gradients"),
    (TrustRatio, {"lr": 0.0}, "TrustRatio is not element-wise: in 12 steps"),
    (Blockwise, {"lr": 0.1}, "Blockwise is not element-wise: in 12 steps"),
    (SharedStep, {"lr": 1e-3}, "SharedStep is not element-wise: in 12 steps"),
    (torch.optim.AdamW, {"lr": -1.0, "eps": -1.0}, "Invalid learning rate: -1"),
]


@pytest.mark.parametrize(("optimizer_class", "options", "message"), CASES, ids=[case[0].__name__ for case in CASES])
def test_refused_with_the_reason(optimizer_class, options, message):
    model = nn.Linear(3, 2)
    before = model.weight.data_ptr()
    with pytest.raises(ValueError, match=message):
        phicore.ZeroOptimizer(model.named_parameters(), optimizer_class, **options)
    assert model.weight.data_ptr() == before


def test_what_one_group_asks_for_is_tried_too():
    """A parameter group can turn on what the optimizer does not do by default."""

    class Decayed(torch.optim.SGD):
        """As LAMB does: takes the ratio of norms where there is weight decay."""

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    size = p.detach().norm() if group["weight_decay"] else 1.0
                    p.detach().sub_(p.grad * group["lr"] * size)

    plain, decayed = nn.Linear(3, 2), nn.Linear(3, 2)
    named = [list(layer.named_parameters(prefix=name)) for name, layer in (("a", plain), ("b", decayed))]
    groups = [{"params": named[0]}, {"params": named[1], "weight_decay": 0.1}]
    with pytest.raises(ValueError, match="Decayed is not element-wise"):
        phicore.ZeroOptimizer(groups, Decayed, lr=0.1)
    optimizer = phicore.ZeroOptimizer(groups[:1], Decayed, lr=0.1)
    before = decayed.weight.data_ptr()
    with pytest.raises(ValueError, match="Decayed is not element-wise"):
        optimizer.add_param_group(groups[1])
    assert decayed.weight.data_ptr() == before
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda p: torch.zeros(3), r"keeps a state kept of shape \[3\] of a parameter of shape \[1\]"),
        (lambda p: torch.zeros(1), r"keeps a state kept of shape \[1\] of a parameter of shape \[\d\d+\]"),
        (lambda p: torch.zeros(2, *p.shape), "keeps a state kept of shape"),
        (lambda p: None, "keeps a state kept of type NoneType"),
        (lambda p: "text", "keeps a state kept of type str"),
    ],
)
def test_state_that_no_file_could_give_back_is_refused_at_once(keep, message):
    with pytest.raises(ValueError, match=message):
        phicore.ZeroOptimizer(nn.Linear(3, 2).named_parameters(), Keeping, keep=keep)


def test_state_of_no_parameter_is_refused_at_once():
    with pytest.raises(ValueError, match="Keeping keeps the state 'all' of no parameter, which is not saved here"):
        phicore.ZeroOptimizer(nn.Linear(3, 2).named_parameters(), Keeping, of_parameter=False)


@pytest.mark.parametrize("keep", [lambda p: 3, lambda p: torch.tensor(2.0), torch.zeros_like])
def test_state_of_elements_and_single_numbers_is_saved_and_loaded(keep):
    model = nn.Linear(3, 2)
    optimizer = phicore.ZeroOptimizer(model.named_parameters(), Keeping, keep=keep)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for saved in (optimizer.state_dict(), optimizer.full_state_dict()):
        optimizer.load_state_dict(saved)
        (of_weight, *_) = optimizer.state_dict()["state"].values()
        assert torch.equal(torch.as_tensor(of_weight["kept"]), torch.as_tensor(keep(of_weight["kept"])))


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
