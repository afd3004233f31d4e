"""How nested dropout, and co-teaching which its paper builds on, take part in a comparison on anybody's data."""

from torch import Tensor, nn

from regularized.evidence.comparison.recipe import Code, Fitting, Need, Recipe, last_linear
from regularized.evidence.comparison.space import Log, Uniform
from regularized.noisy_labels.co_teaching import CoTeaching, forget_schedule
from regularized.noisy_labels.nested_dropout import NestedWidth, select_width
from regularized.training.data import TensorData
from regularized.training.options import Compute, Logging
from regularized.training.terms import CrossEntropy
from regularized.training.trainer import Trainer


def _nested(fitting: Fitting) -> nn.Module:
    """Train with random widths of the last hidden layer, choose the width on validation data, cut."""
    head = last_linear(fitting.model)
    assert head is not None  # said in `needs`
    trainer = Trainer(
        fitting.model,
        terms={"task": CrossEntropy(), "widths": NestedWidth(head, sigma=fitting.settings["sigma"])},
        optimizer=fitting.optimizer,
        schedule=fitting.schedule,
        seed=fitting.setup.seed,
        logging=Logging(every=0, progress_bar=False),
        compute=Compute(device="cpu"),
    )
    trainer.fit(fitting.data, epochs=fitting.setup.epochs)
    inputs, targets = fitting.validation
    select_width(trainer.model, TensorData(inputs, targets, batch_size=1000, shuffle=False))
    return trainer.merge()


class _Mean(nn.Module):
    """The mean output of two networks."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C) logits."""
        mean: Tensor = 0.5 * (self.first(inputs) + self.second(inputs))
        return mean


def _together(fitting: Fitting) -> nn.Module:
    """Two networks that choose samples for each other; their mean predicts."""
    epochs = fitting.setup.epochs
    pair = CoTeaching(
        fitting.model,
        fitting.another(),
        optimizer=fitting.optimizer,
        schedule=fitting.schedule,
        forget_rate=forget_schedule(fitting.settings["forget_rate"], gradual=max(1, epochs // 10)),
        seed=fitting.setup.seed,
    )
    pair.fit(fitting.data, epochs=epochs)
    return _Mean(*pair.networks)


RECIPES = (
    Recipe(
        "nested_dropout",
        "a last hidden layer that is cut to a random width in each step, and to the best one at the end",
        frozenset({"noisy_labels"}),
        {"sigma": Log(2.0, 200.0)},
        "the authors' sigma is 30 to 200 for layers of 512 to 4,096; ours are smaller",
        needs=frozenset({Need.CLASSES, Need.LINEAR_HEAD}),
        fit=_nested,
        code=Code(
            imports="from regularized import NestedWidth, select_width",
            training="""\
# The width is chosen on samples that are not trained on: leave some out, here a tenth.
held_out = len(inputs) // 10
data = TensorData(inputs[held_out:], targets[held_out:], batch_size=data.batch_size)
widths = NestedWidth("{head}", sigma={sigma})
trainer = Trainer(model, terms={{"task": CrossEntropy(), "widths": widths}}, optimizer=optimizer, schedule=cosine())
trainer.fit(data, epochs=epochs)
select_width(trainer.model, TensorData(inputs[:held_out], targets[:held_out], batch_size=1000))
model = trainer.merge().eval()""",
        ),
    ),
    Recipe(
        "co_teaching",
        "two networks, each trained on the samples on which the other one has small losses",
        frozenset({"noisy_labels"}),
        {"forget_rate": Uniform(0.05, 0.6)},
        "the authors forget the share of wrong labels, 0.2 to 0.45, over the first tenth of the epochs",
        needs=frozenset({Need.CLASSES}),
        fit=_together,
        code=Code(
            imports="from regularized import CoTeaching, forget_schedule",
            training="""\
other = {model}
pair = CoTeaching(
    model,
    other,
    optimizer=optimizer,
    schedule=cosine(),
    forget_rate=forget_schedule({forget_rate}, gradual=max(1, epochs // 10)),
)
pair.fit(data, epochs=epochs)
model = pair.predict  # the mean of both""",
        ),
    ),
)
