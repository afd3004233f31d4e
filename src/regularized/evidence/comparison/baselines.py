"""What techniques have to beat: the plain training, and what everybody tries first. Recipes like any other.

All arms share the learning rate and the weight decay, and are tuned in these with as many trials, so that ``plain`` is
already the network whose weight decay is tuned.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.comparison.boosted_trees import RECIPE as BOOSTED_TREES
from regularized.evidence.comparison.recipe import ANY_PROBLEM, Code, Need, Recipe, Settings, Setup, Task, last_linear
from regularized.evidence.comparison.space import Log, Uniform
from regularized.mechanisms.mixup import Mix, draw_mix
from regularized.training.step import Step
from regularized.training.terms import CrossEntropy, Loss, Term

__all__ = ["COMMON", "RECIPES", "MixupLoss", "task_term"]

COMMON = {"lr": Log(1e-3, 3e-1), "weight_decay": Log(1e-5, 1e-1)}
"""Tuned in every arm: around the habits of SGD, and weight decay up to where nothing is learnt."""

_ANYTHING = frozenset({ANY_PROBLEM})
_BOTH: frozenset[Task] = frozenset({"classification", "regression"})


def task_term(setup: Setup) -> Term:
    """The plain loss of a problem: cross-entropy, or the squared error of one output."""
    return CrossEntropy() if setup.task == "classification" else Loss(_squared_error)


def _squared_error(output: Tensor, targets: Tensor) -> Tensor:
    return (output.squeeze(-1) - targets).square()


class MixupLoss(Term):
    """Mixup: the loss on blends of two samples, in the same shares for both labels. It takes the place of the task.

    Args:
        alpha: of the Beta distribution of the shares, above 0.
        task: ``"classification"`` or ``"regression"``.
        seed: of the shares and partners.

    Examples:
        >>> from regularized.training.progress import Progress
        >>> from regularized.training.step import Batch
        >>> batch = Batch.of((torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
        >>> MixupLoss(0.2)(Step(nn.Linear(3, 2), batch, Progress(0, 1))).shape
        torch.Size([])
    """

    is_task = True

    def __init__(self, alpha: float, *, task: str = "classification", seed: int = 0) -> None:
        super().__init__()
        self.alpha = alpha
        self.task = task
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)

    def forward(self, step: Step) -> Tensor:
        """Sum over the samples of the batch."""
        mix: Mix = draw_mix(step.batch.size, self.alpha, generator=self.generator, device=step.inputs.device)
        output = step.forward(mix(step.inputs))
        targets = step.targets
        if self.task == "regression":
            return _squared_error(output, mix(targets)).sum()
        own = F.cross_entropy(output, targets, reduction="sum")
        partner = F.cross_entropy(output, targets[mix.partner], reduction="sum")
        return mix.share * own + (1.0 - mix.share) * partner

    def get_extra_state(self) -> Tensor:
        """State of the generator."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on drawing from a state."""
        self.generator.set_state(state.cpu())


def _with_dropout(model: nn.Module, setup: Setup, settings: Settings) -> nn.Module:
    head = last_linear(model)
    assert head is not None  # said in `needs`
    model.set_submodule(head, nn.Sequential(nn.Dropout(settings["rate"]), model.get_submodule(head)))
    return model


RECIPES = (
    Recipe(
        "plain",
        "the network, with learning rate and weight decay tuned",
        _ANYTHING,
        tasks=_BOTH,
        terms=lambda setup, settings: {},
    ),
    Recipe(
        "early_stopping",
        "a tuned share of the epochs",
        _ANYTHING,
        {"share": Uniform(0.05, 0.95)},
        "ours: from a twentieth of the epochs to nearly all",
        tasks=_BOTH,
        terms=lambda setup, settings: {},
        epochs="share",
        code=Code(before="epochs = max(1, round({share} * epochs))"),
    ),
    Recipe(
        "label_smoothing",
        "a share of each label spread over all classes",
        _ANYTHING,
        {"smoothing": Uniform(0.02, 0.6)},
        "ours: 0.1 is the habit; with wrong labels more helps",
        needs=frozenset({Need.CLASSES}),
        terms=lambda setup, settings: {"task": CrossEntropy(label_smoothing=settings["smoothing"])},
        code=Code(terms={"task": "CrossEntropy(label_smoothing={smoothing})"}),
    ),
    Recipe(
        "dropout",
        "dropout in front of the last layer",
        _ANYTHING,
        {"rate": Uniform(0.05, 0.8)},
        "Srivastava et al. 2014: 0.5 in hidden layers",
        tasks=_BOTH,
        needs=frozenset({Need.LINEAR_HEAD}),
        prepare=_with_dropout,
        code=Code(
            before='model.set_submodule("{head}", nn.Sequential(nn.Dropout({rate}), model.get_submodule("{head}")))'
        ),
    ),
    Recipe(
        "mixup",
        "blends of two samples and their labels",
        _ANYTHING,
        {"alpha": Log(0.05, 8.0)},
        "Zhang et al. 2017: 0.1 to 0.4 on ImageNet, 1 on CIFAR, up to 8 with wrong labels",
        tasks=_BOTH,
        terms=lambda setup, settings: {"task": MixupLoss(settings["alpha"], task=setup.task, seed=setup.seed)},
        code=Code(
            imports="from regularized.evidence.comparison import MixupLoss",
            terms={"task": 'MixupLoss({alpha}, task="{kind}")'},
        ),
    ),
    BOOSTED_TREES,
)
