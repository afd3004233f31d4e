"""Golden vectors of a slow float64 derivation (there is no official code): quiz, patches, factored positions."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from regularized.evidence.conformance import Case, UnknownCase
from regularized.mechanisms.patches import patchify, take
from regularized.self_supervised.selfie.layer import grid_table
from regularized.self_supervised.selfie.loss import selection_logits, selection_loss


def tolerance(case: Case, output: str) -> float:
    """Gradients are finite differences; what is only moved about is exact."""
    if output in ("patches", "table"):
        return 0.0
    return 1e-6 if output.startswith("grad_") else 1e-10


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Outputs of a case, by the kind that its keys show.

    Raises:
        UnknownCase: the keys fit neither the quiz, nor patches, nor positions.
    """
    if case.has("in/u", "in/pos_table", "in/h_target", "in/target_index"):
        summary, table, candidates = (
            torch.tensor(case.inputs[name]).requires_grad_() for name in ("u", "pos_table", "h_target")
        )
        places = take(table[None], torch.tensor(case.inputs["target_index"]))
        logits = selection_logits(summary, places, candidates)
        loss = selection_loss(logits)
        by_u, by_h, by_table = torch.autograd.grad(loss, (summary, candidates, table))
        computed = {"logits": logits, "loss": loss, "grad_u": by_u, "grad_h": by_h, "grad_pos": by_table}
    elif case.has("in/image", "hp/patch_size"):
        computed = {"patches": patchify(torch.tensor(case.inputs["image"]), int(case.number("patch_size")))}
    elif case.has("in/row", "in/col"):
        computed = {"table": grid_table(torch.tensor(case.inputs["row"]), torch.tensor(case.inputs["col"]))}
    else:
        raise UnknownCase(case)
    return {name: tensor.detach().numpy() for name, tensor in computed.items()}
