import collections

import pytest
import torch
from torch import nn

from regularized.mechanisms.taps import Taps
from regularized.training import Batch, Progress, Step

NOW = Progress(0, 1)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_shared_forward_is_computed_once_and_lazily():
    """Fails if creating a step computes, or each property computes again."""
    model = Counting(3, 2)
    step = Step(model, Batch.of((torch.zeros(4, 3), torch.zeros(4).long())), NOW)
    assert model.calls == 0
    assert step.log_probabilities.shape == (4, 2)
    assert step.logits is step.output is step.forward(step.inputs)
    assert model.calls == 1


def test_equal_forwards_are_shared():
    """Fails if two terms that ask for the same pass pay twice, or different ones are confused."""
    model, other = Counting(3, 2), Counting(3, 2)
    step = Step(model, Batch.of(torch.zeros(4, 3)), NOW)
    x = torch.ones(4, 3)
    assert step.forward(x) is step.forward(x)
    assert not step.forward(x, grad=False).requires_grad
    assert step.forward(x, model=other) is not step.forward(x)
    assert (model.calls, other.calls) == (2, 1)


@pytest.mark.parametrize("ask", ["output", "log_probabilities", "logits"])
def test_graph_is_there_though_the_first_who_asks_records_none(ask):
    """Fails if a term of coefficient 0 (computed without gradients) leaves the others a result without graph."""
    step = Step(nn.Linear(3, 2), Batch.of(torch.zeros(4, 3)), NOW)
    x = torch.ones(4, 3)
    with torch.no_grad():
        assert getattr(step, ask).requires_grad
        assert step.forward(x).requires_grad
        assert not step.forward(x, grad=False).requires_grad
    with torch.no_grad():
        assert not Step(nn.Linear(3, 2), Batch.of(x), NOW).output.requires_grad  # evaluation


def test_hidden_is_of_the_shared_pass_also_after_another():
    """Fails if a further forward pass overwrites what a later term reads."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with Taps(model, ["0"]) as taps:
        x = torch.randn(4, 3)
        step = Step(model, Batch.of(x), NOW, taps.states)
        _ = step.output
        step.forward(x + 1)
        assert torch.equal(step.hidden("0"), model[0](x))


def test_call_is_used_for_every_pass():
    """Fails if a loop's wrapper or autocast is left out of further networks."""
    seen = []

    def call(model, inputs):
        seen.append(model)
        return model(inputs)

    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    step = Step(model, Batch.of(torch.zeros(4, 3)), NOW, call=call)
    step.logits, step.forward(torch.ones(4, 3), model=other)
    assert seen == [model, other]


def test_forms_of_a_batch():
    """Fails if a form that a loader yields is sorted wrongly."""
    x, y, i = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([5, 6])
    assert Batch.of((x, y)).index is None
    assert Batch.of([x, y, i]).index is i
    named = Batch.of({"inputs": x, "labels": y, "index": i, "weight": x})
    assert named.targets is y
    assert list(named.extras) == ["weight"]
    hugging = Batch.of({"input_ids": x, "attention_mask": x, "labels": y})
    assert list(hugging.inputs) == ["input_ids", "attention_mask"]
    assert hugging.size == 2
    assert Batch.of(hugging) is hugging
    with pytest.raises(TypeError, match="collate_fn"):
        Batch.of((x, y, i, x))
    with pytest.raises(TypeError, match="int"):
        Batch.of(3)


def test_map_keeps_the_form():
    """Fails if a named tuple, a dictionary or something without tensors is lost on the way to the device."""
    pair = collections.namedtuple("pair", "a b")
    batch = Batch({"p": pair(torch.zeros(2), [torch.zeros(2)])}, torch.zeros(2), None, {"name": "x"})
    moved = batch.map(lambda t: t + 1)
    assert moved.inputs["p"].a.tolist() == [1, 1]
    assert moved.inputs["p"].b[0].tolist() == [1, 1]
    assert moved.extras == {"name": "x"}


def test_log_probabilities_are_float32_in_low_precision():
    """Fails if the softmax is taken in bfloat16."""
    step = Step(nn.Linear(3, 2).bfloat16(), Batch.of(torch.zeros(4, 3).bfloat16()), NOW)
    assert step.log_probabilities.dtype == torch.float32


@pytest.mark.parametrize(
    ("ask", "error", "says"),
    [
        (lambda s: s.targets, ValueError, "targets"),
        (lambda s: s.index, ValueError, "IndexedDataset"),
        (lambda s: s.hidden("0"), ValueError, "taps"),
    ],
)
def test_what_is_missing_is_named(ask, error, says):
    """Fails if a missing part gives None or an unhelpful error."""
    with pytest.raises(error, match=says):
        ask(Step(nn.Linear(3, 2), Batch.of(torch.zeros(4, 3)), NOW))


def test_output_without_logits():
    """Fails if a structure without logits is taken for logits."""
    with pytest.raises(TypeError, match="logits"):
        _ = Step(lambda x: {"loss": x}, Batch.of(torch.zeros(4, 3)), NOW).logits
    tapped = Step(nn.Linear(3, 2), Batch.of(torch.zeros(4, 3)), NOW, {})
    with pytest.raises(KeyError, match="not reached"):
        tapped.hidden("body")


def test_dictionaries_as_hugging_face_yields_them():
    """Fails when its column ``label`` is fed to the model, or columns that no tensor is in are counted forever."""
    batch = Batch.of({"x": torch.zeros(4, 3), "label": torch.tensor([0, 1, 0, 1]), "index": torch.arange(4)})
    assert list(batch.inputs) == ["x"]
    assert batch.targets.tolist() == [0, 1, 0, 1]
    assert Batch.of({"words": ["a", "b"], "inputs": torch.zeros(2, 3), "label_ids": torch.zeros(2)}).size == 2
    with pytest.raises(TypeError, match=r"fed with texts, in \['text'\]; tokenize them"):
        Batch.of({"text": ["one", "two"], "label": torch.tensor([0, 1])})
    with pytest.raises(TypeError, match="hold no tensor"):
        Batch({"length": 3}).size  # noqa: B018


class Named(nn.Module):
    def forward(self, pixels):
        return pixels.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"x": torch.zeros(2, 3)}, r"forward\(pixels\) of Named does not take \['x'\]; rename the columns"),
        ({"pixels": [torch.zeros(2)] * 3}, r"\['pixels'\] are lists of tensors.*with_format"),
    ],
)
def test_a_model_that_cannot_be_fed_by_name(inputs, says):
    """Fails when a data set of dictionaries ends in an error inside torch that names neither columns nor remedy."""
    with pytest.raises(TypeError, match=says):
        Step(Named(), Batch.of(inputs), NOW).output  # noqa: B018


def test_a_model_has_the_word_on_its_own_errors():
    """Fails when every TypeError inside a model that is fed by name is taken for wrong names."""

    class Broken(nn.Module):
        def forward(self, pixels):
            return pixels + "one"

    with pytest.raises(TypeError, match="unsupported operand"):
        Step(Broken(), Batch.of({"pixels": torch.zeros(2, 3)}), NOW).output  # noqa: B018
