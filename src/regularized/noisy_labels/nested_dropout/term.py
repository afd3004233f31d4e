"""Nested dropout in the loop: the layers put in, one random width a step, and the cut at the end.

:mod:`regularized.noisy_labels.nested_dropout.layer` has the paper, its symbols, and the layers.
"""

from collections.abc import Sequence

import torch
from torch import nn

from regularized.mechanisms.ranges import allowed
from regularized.noisy_labels.nested_dropout.cutting import cut_in_place, first_columns
from regularized.noisy_labels.nested_dropout.layer import (
    MU,
    SIGMA,
    NestedDropout,
    NestedLinear,
    nest_classifier,
)
from regularized.training.step import Batch, Step
from regularized.training.terms import Term

__all__ = ["NestedWidth"]


class NestedWidth(Term):
    """Nested dropout in the loop: one random width an optimizer step, for all its micro-batches and processes.

    It replaces the named linear classifiers by :class:`NestedLinear` with the same parameters, adds nothing to the
    loss, and draws from a generator of its own, which checkpoints restore. With several layers a fair die decides at
    each step which of them is cut, and the others pass everything (the paper's way with the two hidden layers of
    VGG-19). Choose the width in the trainer's ``evaluate``; ``trainer.merge()`` cuts the model down to it.

    Args:
        layers: name or names of the linear layers whose inputs are cut.
        sigma: scale of the widths in channels, > 0, see :class:`NestedDropout`.
        mu: the most likely width; default 0 (official code).
        seed: of the widths; default 0.

    Raises:
        ValueError: a setting is outside its range; at the start of training: no such linear layer.

    Examples:
        >>> from functools import partial
        >>> from regularized.noisy_labels.nested_dropout import select_width
        >>> from regularized.training import CrossEntropy, TensorData, Trainer
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3, bias=False))
        >>> data = TensorData(torch.randn(20, 4), torch.randint(3, (20,)), batch_size=10)
        >>> trainer = Trainer(
        ...     model,
        ...     terms={"task": CrossEntropy(), "widths": NestedWidth("2", sigma=5.0)},
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ...     evaluate=lambda model: dict(zip(("width", "accuracy"), select_width(model, data))),
        ... )
        >>> history = trainer.fit(data, epochs=2)
        >>> trainer.merge()[2].in_features == history[-1]["width"]
        True
    """

    sharding = "forward"

    contributes = False

    @allowed(sigma=SIGMA, mu=MU)
    def __init__(self, layers: str | Sequence[str], *, sigma: float, mu: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.layers: tuple[str, ...] = (layers,) if isinstance(layers, str) else tuple(layers)
        if not self.layers:
            raise ValueError("layers must name at least one linear layer of the model")
        self.sigma = sigma
        self.mu = mu
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
        self._nested: tuple[NestedDropout, ...] = ()
        self._due = True

    def attach(self, model: nn.Module) -> None:
        """Put the nested layers in; a second time does nothing."""
        self._nested = tuple(
            nest_classifier(model, name, sigma=self.sigma, mu=self.mu, generator=self.generator).nested
            for name in self.layers
        )

    def transform(self, batch: Batch) -> Batch:
        """Before the first micro-batch of an optimizer step: draw its width. The batch stays as it is."""
        if self._due and self.training:
            self._due = False
            count = len(self._nested)
            cut = int(torch.randint(count, (), generator=self.generator, device="cpu")) if count > 1 else 0
            for number, layer in enumerate(self._nested):
                layer.hold(layer.draw() if number == cut else layer.features)
        return batch

    def after_step(self, step: Step) -> None:
        """The width of this step is used up."""
        self.reset()

    def reset(self) -> None:
        """Let go of the width that is held, and draw for the next step, as at the start."""
        self._due = True
        for layer in self._nested:
            layer.hold(None)

    def merge(self, model: nn.Module) -> None:
        """Leave plain linear layers in place: cut to their ``keep``, of full width where none was chosen."""
        for name in self.layers:
            old = model.get_submodule(name)
            if isinstance(old, NestedLinear):
                if old.nested.keep in (None, old.in_features):
                    model.set_submodule(name, first_columns(old, old.in_features))
                else:
                    cut_in_place(model, name, old.nested.keep, None)
        self._nested = ()
