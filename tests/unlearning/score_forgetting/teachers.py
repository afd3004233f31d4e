"""Teachers of these tests: points and Gaussians whose score is known, and a small network with dropout."""

import torch
from torch import nn

from regularized.unlearning.score_forgetting import ConditionalDiffusion, NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


class GaussianNet(nn.Module):
    """The exact noise in samples of N(mean, deviation^2), a pair for each class."""

    def __init__(self, means, deviations, dtype=torch.float64):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(means, dtype=dtype).view(-1, 1))
        self.log_deviation = nn.Parameter(torch.tensor(deviations, dtype=dtype).log().view(-1, 1))

    def forward(self, x_t, t, labels):
        signal, level = SCHEDULE.levels(t.long(), x_t)
        mean, variance = self.mean[labels], (2 * self.log_deviation[labels]).exp()
        return level * (x_t - signal * mean) / (signal**2 * variance + level**2)


def gaussians(means=(-1.0, 0.5, 2.0), deviations=(0.5, 0.3, 0.4)):
    net = GaussianNet(means, deviations)
    return ConditionalDiffusion(net, shape=(1,), num_classes=len(means)).eval().requires_grad_(False)


class DropoutNet(nn.Module):
    def __init__(self, width=16, classes=3, dropout=0.2):
        super().__init__()
        self.first = nn.Linear(5, width)
        self.label = nn.Embedding(classes, width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, 4)

    def forward(self, x_t, t, labels):
        hidden = self.first(torch.cat([x_t, t[:, None].to(x_t.dtype) / 1000], dim=1)) + self.label(labels)
        return x_t + self.last(self.dropout(torch.tanh(hidden)))


def small_teacher(dropout=0.2, seed=0):
    torch.manual_seed(seed)
    net = DropoutNet(dropout=dropout).double()
    return ConditionalDiffusion(net, shape=(4,), num_classes=3).eval().requires_grad_(False)
