"""Cost of labels and weights, beside training on the pool without them."""

import torch

from regularized.curriculum.active_self_paced.loss import one_vs_rest_hinge
from regularized.curriculum.active_self_paced.procedure import ActiveSelfPaced
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, stepper


def _build() -> tuple[StepFunction, StepFunction]:
    samples, width, classes = 1200, 300, 10
    x, truth = torch.randn(samples, width).to(device()), torch.randint(classes, (samples,)).to(device())
    learner = ActiveSelfPaced(samples, {c: c for c in range(classes)}, num_classes=classes)
    models = [torch.nn.Linear(width, classes).to(device()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in models]
    labels = 2.0 * torch.nn.functional.one_hot(truth, classes) - 1.0

    def plain() -> torch.Tensor:
        return one_vs_rest_hinge(models[0](x), labels).sum(dim=1).mean()

    def self_paced() -> torch.Tensor:
        scores = models[1](x)
        assigned, weights = (part.to(scores) for part in learner.assign(scores))
        return (weights * one_vs_rest_hinge(scores, assigned)).sum(dim=1).mean()

    return stepper(plain, optimizers[0]), stepper(self_paced, optimizers[1])


def workloads() -> list[Workload]:
    """A linear layer on fixed features, labels and weights made anew at every step: the worst case by far."""
    note = "worst case: a linear layer, and labels and weights at every step instead of once a round"
    return [Workload("linear 300-10, pool of 1,200, full batch", _build, note)]
