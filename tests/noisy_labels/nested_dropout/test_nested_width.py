"""Choice of a width, cutting, and the term. Golden vectors and contract are checked in tests/test_contract.py.

Mutations that were tried, each caught: the running sum without what came before its block, a block carried on from its
first width, the penalty turned round, the last of equal widths, the last rows or columns kept, batch normalisation not
cut along, a layer cut that is used twice or lies behind a softmax, one network of a pair left out, a new width for each
micro-batch, the same layer active always, a draw in evaluation mode.
"""

import copy
import math
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regularized.evidence.models import resnet18
from regularized.mechanisms.surgery import NoEffectWarning
from regularized.noisy_labels.nested_dropout import width as nested_width
from regularized.noisy_labels.nested_dropout.cutting import FirstChannels, cut_to_width
from regularized.noisy_labels.nested_dropout.layer import NestedDropout, NestedLinear, nested_layers
from regularized.noisy_labels.nested_dropout.term import NestedWidth
from regularized.noisy_labels.nested_dropout.width import best_width, select_width, width_accuracies
from regularized.training.data import TensorData
from regularized.training.step import Batch


def batches(n=40, features=6, classes=3, size=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator)
    return TensorData(x, torch.randint(classes, (n,), generator=generator), batch_size=size)


def sliced(d=12, bias=False):
    return nn.Sequential(nn.Linear(6, d), nn.ReLU(), NestedLinear(d, 3, sigma=4.0, bias=bias)).double()


class Masked(nn.Module):
    """No nn.Sequential, and a wrapper around the classifier's output where asked for."""

    def __init__(self, d=12, wrap=False):
        super().__init__()
        self.body = nn.Linear(6, d)
        self.drop = NestedDropout(d, sigma=4.0)
        self.head = nn.Linear(d, 3)
        self.wrap = wrap

    def forward(self, x):
        out = self.head(self.drop(self.body(x).relu()))
        return 2 * out + 1 if self.wrap else out


def slow_accuracies(models, data):
    """Every width by hand: the layer set to it, the whole model run."""
    models = [copy.deepcopy(model).eval() for model in models]
    layers = [next(iter(nested_layers(model).values())) for model in models]
    accuracies = []
    for width in range(1, layers[0].features + 1):
        for layer in layers:
            layer.keep = width
        with torch.no_grad():
            mean = sum(model(data.inputs) for model in models) / len(models)
        accuracies.append((mean.argmax(1) == data.targets).double().mean())
    return torch.stack(accuracies)


@pytest.mark.parametrize("block", [1, 3 * 16 * 5, 2**22])
@pytest.mark.parametrize(
    "models",
    [
        lambda: [sliced()],
        lambda: [sliced(bias=True)],
        lambda: [sliced(), sliced(bias=True)],
        lambda: [Masked().double()],
        lambda: [Masked(wrap=True).double()],
        lambda: [sliced(), Masked(wrap=True).double()],
    ],
    ids=["sliced", "bias", "pair", "masked", "wrapped", "mixed pair"],
)
def test_running_sum_equals_every_width(models, block, monkeypatch):
    """Fails when the cumulative evaluation differs from masking D times, over block borders and batches too."""
    monkeypatch.setattr(nested_width, "_BLOCK", block)
    torch.manual_seed(3)
    built = models()
    data = batches()
    data = TensorData(data.inputs.double(), data.targets, batch_size=16)
    torch.testing.assert_close(width_accuracies(built, data), slow_accuracies(built, data), rtol=0, atol=1e-12)


def test_logits_of_all_widths_in_float32():
    """The sheet's bound: running sums agree with masked products to 1e-6."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), NestedLinear(64, 10, sigma=4.0)).eval()
    x = torch.randn(7, 6)
    probe = nested_width._Probe(model, None)
    with torch.no_grad():
        ours = torch.cat(list(nested_width._outputs_of_all_widths([probe], x, 64)), dim=1)
        for width in range(1, 65):
            model[2].nested.keep = width
            torch.testing.assert_close(ours[:, width - 1], model(x), rtol=1e-6, atol=1e-6)


def test_choice_leaves_modes_hooks_and_random_state():
    """Fails when looking at widths leaves the model in evaluation mode, hooked, or moves a random state."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5).eval(), nn.ReLU(), NestedLinear(8, 3, sigma=2.0))
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_width(model, batches())
    assert [m.training for m in model] == [True, False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert not model(torch.ones(1, 6)).isnan().any()


@given(values=st.lists(st.sampled_from([0.1, 0.5, 0.50001, 0.6]), min_size=1, max_size=12))
def test_best_width(values):
    """Fails when ties do not go to the smaller width, or the penalty is counted from another width."""
    width, penalised = best_width(torch.tensor(values, dtype=torch.float64))
    scores = [v - 1e-5 * j for j, v in enumerate(values)]
    assert penalised == max(scores)
    assert width == scores.index(max(scores)) + 1


def test_pair_gets_one_width():
    """Fails when the networks of a pair choose for themselves."""
    torch.manual_seed(1)
    pair = [sliced(), sliced()]
    data = TensorData(batches().inputs.double(), batches().targets, batch_size=40)
    width, accuracy = select_width(pair, data)
    assert [net[2].nested.keep for net in pair] == [width, width]
    mean = sum(net.eval()(data.inputs) for net in pair)
    assert float((mean.argmax(1) == data.targets).double().mean()) == accuracy


def test_choice_among_several_layers():
    """Fails when the wrong one of two nested layers is chosen, or the other does not stay at its width."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), NestedLinear(8, 8, sigma=3.0), nn.ReLU(), NestedLinear(8, 3, sigma=3.0)
    )
    with pytest.raises(ValueError, match=r"several nested layers, \['2', '4'\]"):
        select_width(model, batches())
    with pytest.raises(ValueError, match="no nested layer '3'"):
        select_width(model, batches(), layer="3")
    model[4].nested.keep = 8
    width, accuracy = select_width(model, batches(), layer="2")
    assert (model[2].nested.keep, model[4].nested.keep) == (width, 8)
    data = batches()
    model.eval()
    assert float((model(data.inputs).argmax(1) == data.targets).double().mean()) == pytest.approx(accuracy)


def test_choice_needs_labels():
    """Fails when soft labels or none give an obscure error."""
    x = torch.zeros(4, 6)
    for batch in (x, (x, torch.zeros(4, 3))):
        with pytest.raises(ValueError, match="class labels"):
            width_accuracies(sliced().float(), [batch])
    with pytest.raises(ValueError, match=r"\[5, 12\]"):
        width_accuracies([sliced(5), sliced(12)], batches())
    with pytest.raises(ValueError, match="shape"):
        best_width(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="penalty"):
        best_width(torch.zeros(2), penalty=-1.0)


# -- cutting -----------------------------------------------------------------------------------------


def convolutional(head):
    body = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 10, 3), nn.BatchNorm2d(10), nn.ReLU()
    )
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


CUTS = {
    "linear": lambda: (nn.Sequential(nn.Linear(6, 10), nn.ReLU(), NestedLinear(10, 3, sigma=3.0)), (6,)),
    "batch norm": lambda: (
        nn.Sequential(
            nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10), nn.GELU(), NestedLinear(10, 3, sigma=3.0, bias=True)
        ),
        (6,),
    ),
    "layer": lambda: (
        nn.Sequential(nn.Linear(6, 10), NestedDropout(10, sigma=3.0), nn.Tanh(), nn.Dropout(), nn.Linear(10, 3)),
        (6,),
    ),
    "convolution": lambda: (convolutional([NestedLinear(10, 3, sigma=3.0)]), (1, 8, 8)),
    "convolution, layer": lambda: (convolutional([NestedDropout(10, sigma=3.0), nn.Linear(10, 3)]), (1, 8, 8)),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("width", [1, 4, 10])
def test_cut_keeps_the_outputs_and_is_smaller(name, width):
    """Fails when rows or columns are the wrong ones, or normalisation is not cut along."""
    torch.manual_seed(0)
    model, shape = CUTS[name]()
    for _ in range(3):  # statistics of the normalisation
        model(torch.randn(8, *shape))
    model.eval()
    (layer,) = nested_layers(model).values()
    layer.keep = width
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = cut_to_width(model)
    x = torch.randn(5, *shape)
    torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, NestedDropout | FirstChannels) for m in small.modules())
    features = [m.in_features for m in small.modules() if isinstance(m, nn.Linear)][-1]
    assert features == width
    ratio = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert ratio < 1 or width == 10


def test_cut_where_the_producer_cannot_be_narrowed():
    """A residual net: fails when the last convolution is cut although its output is added to a shortcut."""
    model = resnet18(3, width=2)
    model.head = NestedLinear(16, 3, sigma=4.0, bias=True)
    model.head.nested.keep = 5
    model.eval()
    small = cut_to_width(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert isinstance(small.head[0], FirstChannels)
    assert small.head[1].weight.shape == (3, 5)


def test_cut_of_shared_or_unknown_producers_slices():
    """Fails when a layer that is used twice is narrowed, or a softmax in front of the cut taken for elementwise."""
    shared = nn.Linear(10, 10)
    for first in ([shared, nn.ReLU(), shared], [nn.Linear(10, 10), nn.Softmax(dim=1)]):
        model = nn.Sequential(*first, NestedLinear(10, 3, sigma=3.0)).eval()
        model[-1].nested.keep = 4
        x = torch.randn(5, 10)
        small = cut_to_width(model)
        torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)
        assert any(isinstance(m, FirstChannels) for m in small.modules())


def test_cut_outside_a_sequential():
    """Fails when the reader is guessed, or the named one is not checked."""
    model = Masked().eval()
    model.drop.keep = 3
    with pytest.raises(ValueError, match="classifier="):
        cut_to_width(model)
    with pytest.raises(ValueError, match="'body' is no"):
        cut_to_width(model, classifier="body")
    small = cut_to_width(model, classifier="head")
    x = torch.randn(5, 6)
    torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)
    assert small.head.in_features == 3


def test_cut_of_a_bare_classifier():
    """Fails when the model itself is the nested classifier."""
    model = NestedLinear(6, 3, sigma=2.0).eval()
    x = torch.randn(5, 6)
    model.nested.keep = 2
    torch.testing.assert_close(cut_to_width(model)(x), model(x))
    assert cut_to_width(model, width=4)[1].in_features == 4


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.BatchNorm1d(8), nn.RMSNorm(8)])
def test_normalisation_behind_the_layer(norm):
    """Fails when the outputs change silently: a normalisation reads the zeros."""
    model = nn.Sequential(nn.Linear(6, 8), NestedDropout(8, sigma=3.0), norm, nn.Linear(8, 3)).eval()
    model[1].keep = 3
    with pytest.warns(NoEffectWarning, match="in front"):
        small = cut_to_width(model)
    x = torch.randn(4, 6)
    assert torch.equal(small(x), model(x))


# -- the term ----------------------------------------------------------------------------------------


def drawn(term, model, steps, micro=1):
    """Widths held in each micro-batch of each step."""
    batch = Batch.of(torch.zeros(2, 6))
    widths = []
    for _ in range(steps):
        window = []
        for _ in range(micro):
            assert term.transform(batch) is batch
            window.append(tuple(layer.current_width() for layer in nested_layers(model).values()))
        widths.append(window)
        term.after_step(None)
    return widths


def test_term_draws_once_an_optimizer_step():
    """Fails when micro-batches of one step differ, all steps are alike, or the seed does not decide."""
    sequences = []
    for seed in (0, 0, 1):
        model = sliced()
        term = NestedWidth("2", sigma=6.0, seed=seed)
        term.attach(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        term.attach(model)
        widths = drawn(term, model, 20, micro=3)
        assert all(len(set(window)) == 1 for window in widths)
        sequences.append([window[0] for window in widths])
    assert sequences[0] == sequences[1] != sequences[2]
    assert len(set(sequences[0])) > 3


def test_two_layers_take_turns():
    """Fails when both are cut in a step, or one of them always."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 3))
    term = NestedWidth(("1", "2"), sigma=2.0)
    term.attach(model)
    turns = Counter(tuple(width < 9 for width in window[0]) for window in drawn(term, model, 400))
    assert turns[True, True] == 0
    assert abs(turns[True, False] - 200) < 4 * math.sqrt(100)


def test_term_lets_go_for_evaluation():
    """Fails when a held width outlives its step, or one is drawn while the term evaluates."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3))
    term = NestedWidth("1", sigma=2.0)
    term.attach(model)
    (layer,) = nested_layers(model).values()
    drawn(term, model, 1)
    assert layer._held is None
    state = term.generator.get_state()
    term.eval().transform(Batch.of(torch.zeros(1, 6)))
    assert torch.equal(term.generator.get_state(), state)


def test_term_merges_to_the_chosen_width():
    """Fails when merging forgets the choice, or leaves nested layers behind."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    term = NestedWidth("2", sigma=2.0)
    term.attach(model)
    model.eval()
    model[2].nested.keep = 4
    x = torch.randn(5, 6)
    before = model(x)
    term.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert (model[0].out_features, model[2].in_features) == (4, 4)
    assert all(type(m) in (nn.Sequential, nn.Linear, nn.ReLU) for m in model.modules())
    term.merge(model)


def test_term_refuses():
    """Fails when a term without a layer is accepted."""
    with pytest.raises(ValueError, match="at least one"):
        NestedWidth((), sigma=1.0)
    with pytest.raises(ValueError, match="no submodule 'head'"):
        NestedWidth("head", sigma=1.0).attach(nn.Sequential(nn.Linear(2, 2)))
