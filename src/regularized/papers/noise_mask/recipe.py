"""How noise masks take part in a comparison on anybody's data."""

import math
from functools import partial

import torch
from torch import nn

from regularized.evidence.comparison.recipe import Code, Fitting, Need, Recipe
from regularized.evidence.comparison.space import Log
from regularized.overfitting.noise_mask import BetaMaskPolicy, NoiseMask, NoiseMaskPretraining
from regularized.training.options import Compute, Logging
from regularized.training.terms import CrossEntropy
from regularized.training.trainer import Trainer

_FEATURES = 32


def _masked(fitting: Fitting) -> nn.Module:
    """Half of the epochs with masks, half without: as many passes over the data as every other arm."""
    setup, side = fitting.setup, fitting.setup.input_shape[-1]
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(setup.input_shape), _FEATURES), nn.ReLU())
    mask = NoiseMask(
        BetaMaskPolicy(backbone, features=_FEATURES, grid=max(2, side // 2)), kernel=3, sigma=fitting.settings["sigma"]
    )
    first = setup.epochs // 2
    pretraining = NoiseMaskPretraining(
        fitting.model,
        mask,
        optimizer=fitting.optimizer,
        policy_optimizer=partial(torch.optim.SGD, lr=0.1 * fitting.optimizer.keywords["lr"], momentum=0.9),
        seed=setup.seed,
    )
    pretraining.fit(fitting.data, epochs=first)
    trainer = Trainer(
        pretraining.classifier,
        terms={"task": CrossEntropy()},
        optimizer=fitting.optimizer,
        schedule=fitting.schedule,
        seed=setup.seed,
        logging=Logging(every=0, progress_bar=False),
        compute=Compute(device="cpu"),
    )
    trainer.fit(fitting.data, epochs=setup.epochs - first)
    return trainer.merge()


RECIPES = (
    Recipe(
        "noise_mask",
        "pretraining under noise whose place a small network learns, then plain training",
        frozenset({"overfitting"}),
        {"sigma": Log(0.3, 6.0)},
        "the paper gives no noise level; a prototype of ours on digits",
        needs=frozenset({Need.CLASSES, Need.IMAGES}),
        fit=_masked,
        code=Code(
            imports="from regularized import BetaMaskPolicy, NoiseMask, NoiseMaskPretraining",
            training="""\
side = inputs.shape[-1]
backbone = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 32), nn.ReLU())
mask = NoiseMask(BetaMaskPolicy(backbone, features=32, grid=max(2, side // 2)), kernel=3, sigma={sigma})
policy_optimizer = partial(torch.optim.SGD, lr=0.1 * optimizer.keywords["lr"], momentum=0.9)
pretraining = NoiseMaskPretraining(model, mask, optimizer=optimizer, policy_optimizer=policy_optimizer)
pretraining.fit(data, epochs=epochs // 2)
trainer = Trainer(model, terms={{"task": CrossEntropy()}}, optimizer=optimizer, schedule=cosine())
trainer.fit(data, epochs=epochs - epochs // 2)
model = trainer.merge().eval()""",
        ),
    ),
)
