import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.training import Batch, CrossEntropy, Loss, Objective, Progress, Ridge, Step

NOW = Progress(0, 1)


def mean(term, x, y, model=None):
    batch = Batch.of((x, y))
    return term(Step(model or nn.Identity(), batch, NOW)) / term.count(batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_labels_equal_torch(smoothing, shape):
    """Fails on a wrong reduction, a lost ignored label, or classes in the wrong dimension."""
    torch.manual_seed(0)
    z, y = torch.randn(*shape, 5, dtype=torch.float64), torch.randint(0, 5, shape)
    y.view(-1)[2] = -100
    ours = mean(CrossEntropy(label_smoothing=smoothing), z, y)
    torch.testing.assert_close(ours, F.cross_entropy(z.view(-1, 5), y.view(-1), label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_equal_torch(smoothing):
    """Fails if soft targets are counted by their entries rather than their rows."""
    torch.manual_seed(0)
    z, q = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64).softmax(-1)
    ours = mean(CrossEntropy(label_smoothing=smoothing), z, q)
    torch.testing.assert_close(ours, F.cross_entropy(z, q, label_smoothing=smoothing))


def test_shift_predicts_the_next_position():
    """Fails if labels are shifted the wrong way, or the last position is counted."""
    torch.manual_seed(0)
    z, y = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    y[0, 2] = 9
    ours = mean(CrossEntropy(shift=True, ignore_index=9), z, y)
    expected = F.cross_entropy(z[:, :-1].reshape(-1, 5), y[:, 1:].reshape(-1), ignore_index=9)
    torch.testing.assert_close(ours, expected)


def test_loss_is_the_sum_of_what_the_function_gives():
    """Fails if the term takes a mean of its own."""
    z, y = torch.arange(4.0).view(4, 1), torch.zeros(4)
    assert mean(Loss(lambda z, y: (z.squeeze(-1) - y).square()), z, y) == 3.5


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_ridge_is_the_optimizers_weight_decay():
    """One step of plain SGD with the term equals one with weight_decay: fails for a missing 1/2, or a mean."""
    models, x, y = [two_layers(), two_layers()], torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    for model, decay in zip(models, (0.0, 0.3)):
        terms = {"task": CrossEntropy()} | ({} if decay else {"ridge": Ridge(weight=0.3)})
        objective, batch = Objective(terms), Batch.of((x, y))
        objective.loss(Step(model, batch, NOW), objective.counts([batch])).backward()
        torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=decay).step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(ours, theirs)


def test_ridge_leaves_out_what_is_frozen_or_not_named():
    """Fails if a frozen backbone enters the value, or names are ignored."""
    model = two_layers()
    model[0].requires_grad_(False)
    step = Step(model, Batch.of(torch.zeros(1, 3)), NOW)
    last = 0.5 * sum(p.square().sum() for p in model[2].parameters())
    torch.testing.assert_close(Ridge(weight=1.0)(step), last)
    torch.testing.assert_close(Ridge(["2.bias"], weight=1.0)(step), 0.5 * model[2].bias.square().sum())
    assert Ridge(["2.bias"], weight=7.0).strong_convexity(model) == {"2.bias": 1.0}


def test_ridge_sees_parameters_put_in_their_place():
    """Fails if tensors of functional_call, which require no gradient, are taken for frozen parameters."""
    model = two_layers()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return Ridge(weight=1.0)(Step(self.model, Batch.of(torch.zeros(1, 3)), NOW))

    tensors = {f"model.{name}": torch.ones_like(p) for name, p in model.named_parameters()}
    assert float(torch.func.functional_call(Whole(), tensors, ())) == 0.5 * sum(p.numel() for p in model.parameters())


def test_ridge_per_tensor_sums_to_ridge():
    """Fails if a tensor is lost or counted twice."""
    model = two_layers()
    step, terms = Step(model, Batch.of(torch.zeros(1, 3)), NOW), Ridge.per_tensor(model, weight=0.1)
    assert list(terms) == ["ridge_0_weight", "ridge_0_bias", "ridge_2_weight", "ridge_2_bias"]
    torch.testing.assert_close(sum(term(step) for term in terms.values()), Ridge(weight=0.1)(step))


def test_ridge_in_half_precision():
    """Fails if squares are summed in half precision, where 1e5 entries of 1 come to 256 at most in bfloat16."""
    model = nn.Linear(300, 300, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    assert Ridge(weight=1.0)(Step(model, Batch.of(torch.zeros(1, 300)), NOW)).item() == 45000.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weight": -1.0}, "weight of Ridge must be >= 0"),
        ({"weight": 1.0, "parameters": "0.weight"}, "several names"),
        ({"weight": 1.0, "parameters": []}, "no name"),
    ],
)
def test_ridge_refuses(arguments, words):
    """Fails if a bad setting is found late, or never."""
    with pytest.raises(ValueError, match=words):
        Ridge(**arguments)


def test_ridge_refuses_models_without_such_parameters():
    """Fails if a misspelt name is a penalty on nothing."""
    step = Step(two_layers(), Batch.of(torch.zeros(1, 3)), NOW)
    with pytest.raises(ValueError, match=r"no parameter \['2.wieght'\].*'2.weight'"):
        Ridge(["2.wieght"], weight=1.0)(step)
    with pytest.raises(ValueError, match="no parameter that is trained"):
        Ridge(weight=1.0)(Step(two_layers().requires_grad_(False), Batch.of(torch.zeros(1, 3)), NOW))
    clash = nn.Module()
    clash.a_b, clash.a = nn.Linear(1, 1, bias=False), nn.Module()
    clash.a.b = nn.Linear(1, 1, bias=False)
    with pytest.raises(ValueError, match="share a term's name"):
        Ridge.per_tensor(clash, weight=1.0)
