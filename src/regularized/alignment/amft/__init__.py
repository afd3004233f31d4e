"""AMFT: imitation and reward in one stage, with a weight between them that is learned."""

from regularized.alignment.amft.controller import MetaWeightController
from regularized.alignment.amft.loss import (
    Drift,
    drift,
    generalised_advantages,
    imitation_loss,
    normalised,
    policy_loss,
    token_entropy,
    until_end,
    value_loss,
)
from regularized.alignment.amft.meta_gradient import meta_gradient
from regularized.alignment.amft.mixing import Mixer, Moved
from regularized.alignment.amft.points import PointsGame
from regularized.alignment.amft.ppo import PPO
from regularized.alignment.amft.procedure import AMFT
from regularized.alignment.amft.puzzles import Sums
from regularized.alignment.amft.rollouts import Critic, Rollouts, mean_entropy, sample
from regularized.alignment.amft.schedule import ScheduledWeight

__all__ = [
    "AMFT",
    "PPO",
    "Critic",
    "Drift",
    "MetaWeightController",
    "Mixer",
    "Moved",
    "PointsGame",
    "Rollouts",
    "ScheduledWeight",
    "Sums",
    "drift",
    "generalised_advantages",
    "imitation_loss",
    "mean_entropy",
    "meta_gradient",
    "normalised",
    "policy_loss",
    "sample",
    "token_entropy",
    "until_end",
    "value_loss",
]
