"""Golden vectors: the training loss with its gradients, the language, the triples, and the three probes."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.conformance import Case, UnknownCase
from regularized.understanding.homomorphism_error.command_language import MODIFIERS, VOCABULARY, WORDS, commands
from regularized.understanding.homomorphism_error.penalty import CompositionOperators, composition_loss
from regularized.understanding.homomorphism_error.probes import (
    CompositionProbe,
    modifier_triples,
    probe_errors,
    segment_triples,
    split,
)

TOLERANCE = 1e-10

_WORDS = [VOCABULARY.index(word) for word in WORDS]
_MODIFIERS = [VOCABULARY.index(word) for word in MODIFIERS]


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Which check a case is follows from its keys."""
    if case.has("in/prim_pos", "in/mod_pos", "in/mod_token", "hp/modifier_ids"):
        return _loss(case)
    if case.has("in/generator"):
        return _language(case)
    if case.has("in/ids", "in/hidden"):
        return _triples(case)
    families = sorted({name.split("/")[0] for name in case.inputs if name.endswith("/target")})
    if families:
        return {name: value for family in families for name, value in _probe(case, family).items()}
    raise UnknownCase(case)


def _loss(case: Case) -> Mapping[str, NDArray[Any]]:
    names = sorted((name for name in case.inputs if name.startswith("hidden")), key=lambda name: int(name[6:]))
    hidden = [torch.as_tensor(case.inputs[name]).double().requires_grad_() for name in names]
    modifiers = [int(token) for token in case.hp["modifier_ids"]]
    operators = CompositionOperators(hidden[0].shape[-1], modifiers, hidden=int(case.number("mlp_hidden"))).double()
    operators.load_state_dict(
        {
            name.removeprefix("param/").replace(".net.", "."): torch.as_tensor(value)
            for name, value in case.inputs.items()
            if name.startswith("param/")
        }
    )
    first, second, token = (torch.as_tensor(case.inputs[n]) for n in ("prim_pos", "mod_pos", "mod_token"))
    which = (token[:, None] == torch.tensor(modifiers)).int().argmax(dim=1)
    loss = composition_loss(hidden, (torch.arange(len(first)), first, second), which, operators)
    loss.backward()
    out: dict[str, Tensor] = {"loss": loss.detach()}
    out |= {f"grad_{name}": cast(Tensor, h.grad) for name, h in zip(names, hidden, strict=True)}
    for name, parameter in operators.named_parameters():
        _, modifier, rest = name.split(".", 2)
        out[f"grad_param/ops.{modifier}.net.{rest}"] = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )
    return {name: tensor.numpy() for name, tensor in out.items()}


def _language(case: Case) -> Mapping[str, NDArray[Any]]:
    words, noise, largest, seed = (int(number) for number in case.inputs["generator"])
    pairs = commands(words, noise=noise, largest=largest, seed=seed)
    shown = sorted(f"{' '.join(command)} => {' '.join(meaning)}" for command, meaning in pairs)
    return {"pairs_sorted": np.array(shown), "vocab": np.array(VOCABULARY)}


def _triples(case: Case) -> Mapping[str, NDArray[Any]]:
    tokens, hidden = torch.as_tensor(case.inputs["ids"]), torch.as_tensor(case.inputs["hidden"]).double()
    modifier = modifier_triples(tokens, hidden, _WORDS, _MODIFIERS)
    segments = segment_triples(tokens, hidden, _WORDS)
    return {
        "mod": modifier.numpy(),
        "seq": segments.numpy(),
        "n_train_mod": np.array(len(split(modifier)[0])),
        "n_train_seq": np.array(len(split(segments)[0])),
    }


def _probe(case: Case, family: str) -> Mapping[str, NDArray[Any]]:
    a, b, target = (torch.as_tensor(case.inputs[f"{family}/{name}"]).double() for name in ("a", "b", "target"))
    probe = CompositionProbe(a.shape[-1], cast(Any, family)).double()
    prefix = f"{family}/param/"
    state = {
        name.removeprefix(prefix): torch.as_tensor(v) for name, v in case.inputs.items() if name.startswith(prefix)
    }
    probe.load_state_dict(state)
    with torch.no_grad():
        predicted = probe(a, b)
        mse, cosine = probe_errors(predicted, target)
    return {f"{family}/pred": predicted.numpy(), f"{family}/mse": mse.numpy(), f"{family}/cos": cosine.numpy()}
