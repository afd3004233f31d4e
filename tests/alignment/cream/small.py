"""A loop small enough for tests: random models of eight tokens."""

from functools import partial

import torch

from regularized.alignment.cream import CREAM
from regularized.alignment.sampling import sample_responses
from regularized.evidence.language_models import small_lm

PROMPTS = [torch.tensor([k % 8, k // 8]) for k in range(24)]


def model(seed):
    return small_lm(seed, 8, width=16, layers=1, heads=2)


def build(**options):
    settings = {
        "sample": partial(sample_responses, count=4, max_new_tokens=4, end=7, temperature=1.0),
        "optimizer": partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
        "chunk": 8,
        "batch_size": 4,
        "epochs": 2,
        **options,
    }
    return CREAM(settings.pop("policy", None) or model(1), settings.pop("base", None) or model(0), **settings)
