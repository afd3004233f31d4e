"""Conversion of models, what is refused, the counts of what is lost, and the term."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularized.compression.low_precision.convert import convert, to_plain
from regularized.compression.low_precision.layer import LowPrecisionLinear
from regularized.compression.low_precision.optimizer import LowPrecisionOptimizer
from regularized.compression.low_precision.recipe import RECIPES
from regularized.compression.low_precision.statistics import losses_of, watch
from regularized.compression.low_precision.straight_through import LearnedStep, fake_quantize
from regularized.compression.low_precision.term import LowPrecision
from regularized.training import Checkpoints, CrossEntropy, TensorData, Trainer


def network() -> nn.Module:
    """An embedding, a norm, two linear layers and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(8, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 5)
    )


def test_parameters_stay_the_same_objects() -> None:
    """An optimizer that was built before still trains the model. Fails when weights are copied."""
    model = network()
    before = dict(model.named_parameters())
    assert convert(model, "mxfp8", exclude=["5"]) == ["2", "4"]
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not isinstance(model[5], LowPrecisionLinear)
    assert set(model.state_dict()) == set(network().state_dict())
    to_plain(model)
    assert type(model[2]) is nn.Linear
    assert all(p is before[name] for name, p in model.named_parameters())


def test_copies_and_the_meta_device() -> None:
    """Fails on a layer that cannot be copied, or needs its values to be converted."""
    model = network()
    convert(model, "mxfp4_random")
    twin = copy.deepcopy(model)
    tokens = torch.randint(8, (3, 7))
    assert torch.equal(model(tokens), twin(tokens))
    with torch.device("meta"):
        empty = network()
    convert(empty, "fp8_delayed")
    assert empty[2].weight.is_meta


def test_sensitive_layers_are_named_or_left_alone() -> None:
    """Norms and embeddings in four bits by a pattern are refused; by whole names they are rounded at each use."""
    model = network()
    convert(model, "mxfp4")
    assert type(model[1]) is nn.LayerNorm
    with pytest.raises(ValueError, match=r"matches no linear layer, but LayerNorm: in 4.25 bits .* whole names"):
        convert(nn.ModuleDict({"norm_a": nn.LayerNorm(4), "l": nn.Linear(4, 4)}), "mxfp4", include=["norm*"])
    model = network()
    assert convert(model, "mxfp4", include=["0", "2"]) == ["0", "2"]
    assert model[0].weight.unique().numel() < 8 * 32 / 2
    model(torch.randint(8, (3, 7))).sum().backward()
    assert model[0].parametrizations["weight"].original.grad is not None
    to_plain(model)
    assert isinstance(model[0].weight, nn.Parameter)


def test_losses_are_what_a_count_by_hand_gives() -> None:
    """Fails when zeros count as underflow, or the largest value as saturated."""
    x = torch.tensor([0.0, 0.2, 0.26, 6.0, 6.1, -9.0, float("nan"), float("inf")])
    lost = losses_of(x, "e2m1")
    assert (lost.values, lost.saturated, lost.underflowed, lost.not_finite) == (8, 2 / 8, 1 / 8, 2 / 8)


def test_a_watch_counts_every_operand_and_leaves_no_trace() -> None:
    """Fails on an operand that is not shown, on counts that replace each other, and on an observer that stays."""
    model = network()
    convert(model, "mxfp4", include=["2"])
    tokens = torch.randint(8, (4, 8))
    with watch(model) as seen:
        for _ in range(2):
            model(tokens).square().sum().backward()
    report = seen.report()
    assert len(report) == 6
    assert report["2", "forward", "left"].values == 2 * 4 * 8 * 32
    assert report["2", "weight_gradient", "left"].values == 2 * 4 * 8 * 64
    assert 0 < report["2", "weight_gradient", "left"].underflowed < 1
    assert seen.by_product()["forward", "right"].signal_to_noise > 10
    assert model[2].observer is None


def test_a_strict_watch_names_the_layer() -> None:
    """Fails when NaN goes on silently."""
    model = network()
    convert(model, "mxfp8")
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with (
        pytest.raises(FloatingPointError, match="layer '2', forward product, right operand"),
        watch(model, strict=True),
    ):
        model(torch.randint(8, (2, 2)))
    with watch(model) as seen:
        model(torch.randint(8, (2, 2)))
    assert seen.report()["2", "forward", "right"].not_finite > 0


@pytest.mark.parametrize("rule", ["identity", "inside", "trusted"])
def test_straight_through_gradients_by_their_rules(rule: str) -> None:
    """Fails on a mask that is turned round."""
    x = torch.tensor([0.2, 0.9, 2.4, 7.0, -30.0], requires_grad=True)
    y = fake_quantize(x, "e2m1", gradient=rule, threshold=0.3 if rule == "trusted" else None)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0.0, 1.0, 2.0, 6.0, -6.0]
    expected = {"identity": [1, 1, 1, 1, 1], "inside": [1, 1, 1, 0, 0], "trusted": [1, 1, 0, 0, 0]}[rule]
    assert gradient.tolist() == expected


def test_a_learned_step_has_lsqs_gradient() -> None:
    """Against the paper's three cases. Fails on a gradient that is not divided by sqrt(n Q)."""
    step = LearnedStep(3)
    x = torch.tensor([0.3, -0.6, 9.0, -9.0])
    step(x)  # sets the step
    step.eval()
    with torch.no_grad():
        step.step.fill_(0.5)
    step(x).sum().backward()
    scaled = x / 0.5
    inside = (scaled > -4) & (scaled < 3)
    by_hand = torch.where(inside, scaled.round() - scaled, torch.where(scaled > 0, 3.0, -4.0))
    assert step.step.grad is not None
    torch.testing.assert_close(step.step.grad, by_hand.sum() / (4 * 3) ** 0.5)


def test_training_with_the_term_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Random signs, stochastic rounding, delayed scales, weights in bf16 and states in 8 bits, all from a checkpoint.

    Fails when any of the streams, histories or codes is not in it.
    """
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    data = TensorData(x, x[:, :4].argmax(1), batch_size=8, seed=1)

    def trainer(recipe: str, folder: Path | None) -> Trainer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))

        def optimizer(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
            inner = torch.optim.AdamW(groups, lr=1e-2)
            return LowPrecisionOptimizer(inner, weights="bf16", states="8bit", smallest=256, seed=4)

        return Trainer(
            model,
            terms={"task": CrossEntropy(), "formats": LowPrecision(recipe)},
            optimizer=optimizer,
            checkpoints=None if folder is None else Checkpoints(folder, every=1),
        )

    for recipe in ("mxfp4_random", "fp8_delayed"):
        whole = trainer(recipe, None)
        whole.fit(data, epochs=2)
        trainer(recipe, tmp_path / recipe).fit(data, epochs=2, max_steps=4)
        resumed = trainer(recipe, tmp_path / recipe)
        resumed.fit(data, epochs=2, resume=True)
        for name, p in whole.model.named_parameters():
            assert torch.equal(p, resumed.model.get_parameter(name)), name


def test_the_term_is_idempotent_and_draws_again_what_a_broken_step_drew() -> None:
    """Fails when an interrupted step moves the stream."""
    model, term = network(), LowPrecision("mxfp4_random", seed=7)
    term.attach(model)
    layers = [m for m in model.modules() if isinstance(m, LowPrecisionLinear)]
    term.attach(model)
    assert layers == [m for m in model.modules() if isinstance(m, LowPrecisionLinear)]
    tokens, target = torch.randint(8, (6,)), torch.arange(6) % 5

    def gradient() -> torch.Tensor:
        loss = F.cross_entropy(model(tokens), target)
        found: torch.Tensor = torch.autograd.grad(loss, model[2].weight)[0]
        return found

    first = gradient()
    term.reset()
    assert torch.equal(gradient(), first)
    term.after_step(None)  # type: ignore[arg-type]
    term.reset()
    assert not torch.equal(gradient(), first)


def test_every_layer_draws_its_own() -> None:
    """Fails when equal layers round in step with each other."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].load_state_dict(model[0].state_dict())
    convert(model, RECIPES["mxfp4_random"])
    x, g = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)
    first, second = (torch.autograd.grad(layer(x), layer.weight, g)[0] for layer in model)
    assert not torch.equal(first, second)
