"""Which patches are hidden: those that are expected to be hard first, the others at random.

:mod:`regularized.self_supervised.hard_patches.loss` has the symbols.
"""

import torch
from torch import Tensor

from regularized.mechanisms.patches import Split, hide_highest, random_split
from regularized.mechanisms.ranges import allowed, between, share

__all__ = ["hard_patch_split", "hidden_patches"]

RATIO = between(0.0, 1.0, "()", "the share of the patches that is hidden", "the paper uses 0.75")
HARD = share("the share of the hidden patches that is chosen for being hard", "the paper lets it rise from 0 to 0.5")


@allowed(mask_ratio=RATIO)
def hidden_patches(patches: int, mask_ratio: float) -> int:
    """How many patches are hidden: all but ``int(patches * (1 - mask_ratio))``, as the official code counts.

    Raises:
        ValueError: none would stay visible, or all.

    Examples:
        >>> hidden_patches(196, 0.75)
        147
    """
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise ValueError(
            f"with mask_ratio={mask_ratio} {visible} of {patches} patches would stay visible; an autoencoder needs at "
            "least one to see and one to predict: take another ratio, or smaller patches"
        )
    return patches - visible


@allowed(hard=HARD)
def hard_patch_split(
    scores: Tensor, *, mask_ratio: float = 0.75, hard: float, generator: torch.Generator | None = None
) -> Split:
    """Hide in each image the patches of the highest scores, and as many others at random as are missing.

    Args:
        scores: (B, N) expected difficulty of each patch.
        mask_ratio: gamma; default 0.75 (official).
        hard: alpha_t, so that ``int(M * hard)`` patches are chosen by their score. Where that is 0 the scores are not
            looked at; see :func:`~regularized.mechanisms.patches.random_split`.
        generator: on the device of the scores; None is the device's global one.

    Returns:
        The split; exactly the same number of patches is hidden in each row.

    Raises:
        ValueError: a setting outside its range, or scores that are not finite. On an accelerator looking at them would
            make the host wait, so there they are not looked at; a loss that is not finite shows the same fault.

    Examples:
        >>> scores = torch.arange(16.0).expand(2, 16)
        >>> split = hard_patch_split(scores, hard=0.5)
        >>> split.hidden.shape, split.mask[:, 10:].all().item()
        (torch.Size([2, 12]), True)
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape (B, N), got {tuple(scores.shape)}")
    batch, patches = scores.shape
    hidden = hidden_patches(patches, mask_ratio)
    chosen = int(hidden * hard)
    if chosen == 0:
        return random_split(batch, patches, hidden, generator=generator, device=scores.device)
    if scores.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(scores.isfinite().all()):
        raise ValueError(
            "scores must be finite, got NaN or infinity, which would be hidden before all others; the network that "
            "predicts them has diverged: lower the learning rate, and look for inputs that are not finite"
        )
    priority = torch.rand(batch, patches, generator=generator, device=scores.device)
    priority.scatter_(1, scores.topk(chosen, dim=1).indices, torch.inf)
    return hide_highest(priority, hidden)
