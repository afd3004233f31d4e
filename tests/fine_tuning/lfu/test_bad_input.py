"""Bad inputs of `lfu`: each is answered by what was given, what is allowed, and how to mend it."""

from typing import Any

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.fine_tuning.lfu.penalty import hidden_state_consistency
from regularized.fine_tuning.lfu.regularizer import LfU
from regularized.fine_tuning.lfu.steps import AuxiliaryLoRA
from regularized.fine_tuning.lfu.term import LfUTerm
from regularized.papers.lfu.contract import LENGTH, TinyLM, token_data


def _batch():
    data = token_data(4, 0)
    return data["inputs"], data["targets"]


def _loss(model: nn.Module, ids: Tensor, labels: Tensor):
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")


def _step(
    *, labels: Tensor | None = None, training: bool = True, grad: bool = True, factor: float = 1.0, **settings: Any
):
    ids, targets = _batch()
    labels = targets if labels is None else labels
    lfu = LfU(TinyLM().train(training), **settings)
    with torch.set_grad_enabled(grad), lfu.record(mask=labels != -100):
        loss = _loss(lfu.model, ids, labels)
    (loss * factor).backward()
    return lfu.backward()


def _not_back_propagated():
    lfu = LfU(TinyLM())
    with lfu.record():
        _loss(lfu.model, *_batch())
    lfu.backward()


def _bare_term():
    LfUTerm().transform(None)


def bad_inputs():
    """Every line of the sheet's "bad input", and what a user meets besides."""
    flat = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    states = torch.zeros(2, 3, 4)
    none = torch.full((4, LENGTH), -100)
    return [
        refused("alpha <= 0", lambda: LfU(TinyLM(), alpha=0.0), ValueError, ("alpha must be positive", "0.0")),
        refused("alpha > 1", lambda: LfU(TinyLM(), alpha=2.0), UserWarning, ("alpha=2.0", "0.1")),
        refused("alpha <= 0, the term", lambda: LfUTerm(alpha=-1.0), ValueError, ("alpha must be positive", "-1.0")),
        refused("lambda < 0", lambda: LfU(TinyLM(), strength=-1.0), ValueError, ("strength", ">= 0", "-1.0")),
        refused("lambda < 0, the term", lambda: LfUTerm(weight=-1.0), ValueError, ("weight", ">= 0", "-1.0")),
        refused("no hidden states", lambda: LfU(flat), ValueError, ("no list of equal blocks", "layers=['0']")),
        refused(
            "no hidden states in the output",
            lambda: _step(layers="hidden_states"),
            ValueError,
            ("output_hidden_states=True", "layers="),
        ),
        refused("layer out of range", lambda: LfU(TinyLM(), layers=[2]), ValueError, ("layer 2", "2 blocks")),
        refused("no such layer", lambda: LfU(TinyLM(), layers=["blocks.9"]), ValueError, ("blocks.9", "did you mean")),
        refused("no layer", lambda: LfU(TinyLM(), layers=[]), ValueError, ("layers is empty",)),
        refused("a layer as a word", lambda: LfU(TinyLM(), layers="last"), ValueError, ("layers must be", "last")),
        refused("no valid token", lambda: _step(labels=none), UserWarning, ("ascent gradient is 0", "left out")),
        refused("no valid token", lambda: _other_batch(none), UserWarning, ("no position is valid", "left out")),
        refused("gradient not finite", lambda: _step(factor=torch.inf), UserWarning, ("not finite", "left out")),
        refused(
            "hidden states of another shape",
            lambda: hidden_state_consistency(states, states[:, :2]),
            ValueError,
            ("same batch", "(2, 3, 4)", "(2, 2, 4)"),
        ),
        refused(
            "other number of layers", lambda: hidden_state_consistency([states], [states] * 2), ValueError, ("1 and 2",)
        ),
        refused(
            "mask that does not fit",
            lambda: hidden_state_consistency(states, states, torch.ones(2, 4, dtype=torch.bool)),
            ValueError,
            ("mask must be boolean", "(2, 3)", "(2, 4)"),
        ),
        refused("evaluation mode", lambda: _step(training=False), RuntimeError, ("evaluation mode", "model.train()")),
        refused("no_grad", lambda: _step(grad=False), RuntimeError, ("no_grad",)),
        refused("nothing recorded", lambda: LfU(TinyLM()).backward(), RuntimeError, ("no forward pass was recorded",)),
        refused("loss not back-propagated", _not_back_propagated, RuntimeError, ("loss.backward()", "ascend")),
        refused(
            "compiled model", _step_through_another_module, RuntimeError, ("no forward pass was recorded", "was given")
        ),
        refused("unknown aux", lambda: LfU(TinyLM(), aux="rep"), ValueError, ("lora", "self", "rep")),
        refused("unknown reduction", lambda: LfU(TinyLM(), reduction="all"), ValueError, ("'sum'", "all")),
        refused("clip_norm <= 0", lambda: LfU(TinyLM(), clip_norm=0.0), ValueError, ("clip_norm", "0.0")),
        refused("rank < 1", lambda: AuxiliaryLoRA(rank=0), ValueError, ("rank", "0")),
        refused(
            "LoRA on what is not linear",
            lambda: LfU(TinyLM(), aux=AuxiliaryLoRA(targets=["embedding"])),
            ValueError,
            ("embedding", "blocks.0.linear"),
        ),
        refused(
            "steering without layers",
            lambda: LfU(TinyLM(), aux="steering", layers="hidden_states"),
            ValueError,
            ("steering needs layers",),
        ),
        refused("nothing trainable", _frozen, ValueError, ("nothing in the model is trainable",)),
        refused("term without attach", _bare_term, RuntimeError, ("attach(model)",)),
    ]


def _other_batch(labels: Tensor):
    ids, targets = _batch()
    lfu = LfU(TinyLM())
    lfu.ascend(lambda model: _loss(model, ids, targets))
    with lfu.record(mask=labels != -100):
        lfu.model(ids).sum().backward()
    lfu.backward()


def _step_through_another_module():
    ids, targets = _batch()
    lfu = LfU(TinyLM())
    with lfu.record():
        loss = _loss(TinyLM(), ids, targets)
    loss.backward()
    lfu.backward()


def _frozen():
    ids, _ = _batch()
    lfu = LfU(TinyLM().requires_grad_(False))
    with lfu.record():
        lfu.model(ids)
    lfu.backward()


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    assert_refused(call, error, says)
