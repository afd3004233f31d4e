"""One-step adversarial training and AAER in the loop.

:mod:`regularized.robustness.abnormal_examples.penalty` has the paper and its symbols.
"""

from dataclasses import replace
from warnings import warn

from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, at_least
from regularized.robustness.abnormal_examples.penalty import (
    LOSS_WEIGHT,
    OUTPUT_WEIGHT,
    abnormal_penalty,
    variation,
)
from regularized.robustness.attacks import Attacked, OneStep, cross_entropies
from regularized.training.progress import Coefficient
from regularized.training.step import Batch, Step
from regularized.training.terms import Term

__all__ = ["AbnormalExamples", "AbnormalShare", "OneStepTraining"]

ATTACKED = "attacked"
"""Name under which a batch keeps what its attack found."""


class OneStepTraining(Term):
    """Adversarial training: each batch is attacked by one step before the forward pass. It adds nothing to the loss.

    All other terms see attacked inputs: ``CrossEntropy`` beside it makes the training of Goodfellow et al. (FGSM), Wong
    et al. (RS-FGSM) or de Jorge et al. (N-FGSM), whichever ``attack`` is. The attack runs in training mode, as in
    the authors' code, so batch normalisation counts each batch twice; it runs in the precision of the weights, outside
    autocast. Evaluation is on inputs as they are.

    Args:
        attack: the step, for example ``OneStep.rs_fgsm(Threat(8 / 255))``.
        keep_graph: leave the attack's forward pass differentiable, which ``AbnormalExamples(loss_gradient=True)``
            needs; default False, since it costs a third of a step.

    Raises:
        TypeError: ``attack`` is no :class:`~regularized.robustness.attacks.OneStep`; at a step: inputs that are no
            tensor.
        ValueError: at a step: inputs outside the range of the data, or a batch without targets.
        RuntimeError: at a step: no training has begun.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from regularized.robustness.attacks import Threat
        >>> from regularized.training import CrossEntropy, TensorData, Trainer
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> trainer = Trainer(
        ...     model,
        ...     terms={
        ...         "attack": OneStepTraining(OneStep.rs_fgsm(Threat(8 / 255))),
        ...         "task": CrossEntropy(),
        ...         "abnormal": AbnormalExamples(output_weight=1.5),
        ...         "abnormal_share": AbnormalShare(),
        ...     },
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ... )
        >>> _ = trainer.fit(TensorData(torch.rand(64, 1, 8, 8), torch.randint(10, (64,)), batch_size=32), epochs=1)
    """

    sharding = "forward"
    contributes = False

    def __init__(self, attack: OneStep, *, keep_graph: bool = False) -> None:
        super().__init__()
        if not isinstance(attack, OneStep):
            raise TypeError(
                f"attack must be a OneStep, for example OneStep.rs_fgsm(Threat(8 / 255)), got {type(attack).__name__}"
            )
        self.attack = attack
        self.keep_graph = keep_graph
        self._model: tuple[nn.Module, ...] = ()  # in a tuple: not a submodule
        self._warned = False

    def attach(self, model: nn.Module) -> None:
        """Remember the model, which stays as it is."""
        self._model = (model,)

    def transform(self, batch: Batch) -> Batch:
        """The attacked batch; what the attack found is in its extras. In ``eval()`` mode the batch as it is."""
        if not self.training:
            return batch
        if not self._model:
            raise RuntimeError("OneStepTraining knows no model; a trainer calls attach(model), as your own loop must")
        (model,) = self._model
        if not model.training and not self._warned:
            self._warned = True
            warn(
                "OneStepTraining attacks a model that is in evaluation mode: its batch normalisation does not see the "
                "attacked inputs that it is trained for. Call model.train() before training",
                UserWarning,
                stacklevel=2,
            )
        if batch.targets is None:
            raise ValueError("OneStepTraining needs labels to attack; yield (x, y), or a mapping with `targets`")
        found = self.attack(model, batch.inputs, batch.targets, keep_graph=self.keep_graph)
        return replace(batch, inputs=found.inputs, extras={**batch.extras, ATTACKED: found})


class AbnormalExamples(Term):
    """AAER as a term beside ``OneStepTraining`` and ``CrossEntropy``; see :class:`AbnormalExamplesLoss` for when.

    Statistics are those of a batch over all processes. With gradient accumulation they are those of a micro-batch, as
    in batch normalisation: few samples decide little, so keep micro-batches large.

    Args:
        weight: lambda1, a number or a schedule; default 1. For long trainings the authors' code suggests
            ``min(epoch / 20, 1)``.
        loss_weight: lambda2 >= 0; default 2.5. Moves no weight unless ``loss_gradient``.
        output_weight: lambda3 >= 0; default 1.5.
        loss_gradient: differentiate dCE, too; default False (official code). Needs
            ``OneStepTraining(attack, keep_graph=True)``.

    Raises:
        ValueError: a weight below 0; at a step: the batch was not attacked, or, with ``loss_gradient``, without graph.

    Examples:
        >>> import torch
        >>> from regularized.robustness.attacks import OneStep, Threat
        >>> from regularized.training import Progress
        >>> model, attack = nn.Linear(4, 3), OneStepTraining(OneStep.fgsm(Threat(0.1)))
        >>> attack.attach(model)
        >>> batch = attack.transform(Batch.of((torch.rand(8, 4), torch.zeros(8, dtype=torch.long))))
        >>> float(AbnormalExamples()(Step(model, batch, Progress(0, 1))).detach())  # nothing is abnormal
        0.0
    """

    sharding = "forward"

    @allowed(weight=at_least(0.0, "lambda1").or_schedule(), loss_weight=LOSS_WEIGHT, output_weight=OUTPUT_WEIGHT)
    def __init__(
        self,
        *,
        weight: Coefficient = 1.0,
        loss_weight: float = 2.5,
        output_weight: float = 1.5,
        loss_gradient: bool = False,
    ) -> None:
        super().__init__(weight=weight)
        self.loss_weight = loss_weight
        self.output_weight = output_weight
        self.loss_gradient = loss_gradient

    def forward(self, step: Step) -> Tensor:
        """B times the regulariser; 0 in ``eval()`` mode for inputs that nobody attacked."""
        found = _found(step, self)
        if found is None:
            return step.logits.new_zeros(())
        if self.loss_gradient and self.training and not found.losses.requires_grad:
            raise ValueError(
                "AbnormalExamples(loss_gradient=True) differentiates the losses before the attack, which were left "
                "without graph; use OneStepTraining(attack, keep_graph=True)"
            )
        losses = cross_entropies(step.logits, step.targets)
        seen = variation(found.logits, found.losses, step.logits, losses)
        return abnormal_penalty(
            found.logits,
            found.losses,
            step.logits,
            losses,
            seen,
            loss_weight=self.loss_weight,
            output_weight=self.output_weight,
            loss_gradient=self.loss_gradient,
        )

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return (
            f"weight={self.weight}, loss_weight={self.loss_weight}, output_weight={self.output_weight}, "
            f"loss_gradient={self.loss_gradient}"
        )


class AbnormalShare(Term):
    """The early warning in the log: share of abnormal examples, beside any one-step training. It changes nothing.

    A share that rises says that one-step training begins to break down: look at accuracy under many steps then.
    """

    sharding = "forward"

    def __init__(self) -> None:
        super().__init__(weight=0.0)  # logged, and no part of the loss

    def forward(self, step: Step) -> Tensor:
        """Number of abnormal examples in the batch."""
        found = _found(step, self)
        if found is None:
            return step.logits.new_zeros(())
        return (found.losses > cross_entropies(step.logits, step.targets)).to(found.losses.dtype).sum()


def _found(step: Step, term: nn.Module) -> Attacked | None:
    found = step.batch.extras.get(ATTACKED)
    if found is None and term.training:
        raise ValueError(
            f"{type(term).__name__} needs what the attack found, but the batch was not attacked: add "
            '"attack": OneStepTraining(...) to the terms'
        )
    return found
