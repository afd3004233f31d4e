"""What is looked at before a distillation: whether the teacher takes labels, and answers as it was declared."""

import warnings

import torch
from torch import Tensor

from regularized.unlearning.score_forgetting.diffusion import ConditionalDiffusion
from regularized.unlearning.score_forgetting.labels import LabelSampler

__all__ = ["frozen", "probe_teacher"]

_BATCH = 16
_ALIKE, _UNLIKE = 0.9, 0.5  # cosine of answer and input at the noisiest step: surely the noise, surely something else


def frozen(teacher: ConditionalDiffusion) -> ConditionalDiffusion:
    """The teacher itself, in evaluation mode and without gradients of its weights.

    Warns:
        UserWarning: it was not so.
    """
    faults = []
    if any(part.training for part in teacher.network.modules()):
        faults.append("was in training mode")
    if any(parameter.requires_grad for parameter in teacher.parameters()):
        faults.append("had parameters that need a gradient")
    if faults:
        warnings.warn(
            f"the teacher {' and '.join(faults)}; it is frozen now, in place. Say teacher.eval().requires_grad_(False)",
            stacklevel=3,
        )
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def probe_teacher(teacher: ConditionalDiffusion, labels: LabelSampler, *, t_range: tuple[int, int]) -> None:
    """Ask the teacher about random samples, once.

    Args:
        teacher: frozen.
        labels: what will be asked.
        t_range: the steps that will be asked about.

    Raises:
        TypeError: it does not take labels.
        ValueError: its estimate of the clean sample is of another shape, not finite, or the same for all labels.

    Warns:
        UserWarning: it answers as if it predicted something else than it was declared to.
    """
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), torch.get_default_dtype())
    draws = torch.Generator().manual_seed(0)
    x = torch.randn((_BATCH, *teacher.shape), generator=draws, dtype=dtype).to(device)
    asked = labels.kept(_BATCH, draws).to(device)
    last = torch.full((_BATCH,), len(teacher.schedule) - 1, device=device)
    output = _answer(teacher, x, last, asked)
    if output.shape != x.shape:
        raise ValueError(
            f"the teacher must answer in the shape of its input, {tuple(x.shape)}; it gave {tuple(output.shape)}. Is "
            f"shape={teacher.shape} that of one sample, and is a learned variance split off?"
        )
    for step in (t_range[0], t_range[1] - 1):
        t = torch.full_like(last, step)
        if not bool(teacher.denoised(x, t, asked).isfinite().all()):
            raise ValueError(
                f"the teacher's estimate of the clean sample is not finite at step {step}, with "
                f"prediction={teacher.prediction!r}; give prediction= as it was trained ('eps', 'x0' or 'v'), or "
                "narrow t_range"
            )
    _check_prediction(teacher, x, output)
    if teacher.num_classes > 1:
        middle = torch.full_like(last, sum(t_range) // 2)
        answers = [teacher(x, middle, torch.full_like(asked, label)) for label in range(min(teacher.num_classes, 3))]
        if all(torch.equal(answers[0], other) for other in answers[1:]):
            raise ValueError(
                "the teacher answers the same for every label, so no class can be told from another: is the label "
                "passed on, or dropped (as for guidance)?"
            )


def _answer(teacher: ConditionalDiffusion, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    try:
        output: Tensor = teacher(x, t, labels)
    except TypeError as error:
        raise TypeError(
            f"the teacher must take network(x_t, t, labels), and return a tensor: {error}. Put a module around it that "
            "does; a model without labels has no class to forget"
        ) from error
    return output


def _check_prediction(teacher: ConditionalDiffusion, x: Tensor, output: Tensor) -> None:
    """At the noisiest step what came in is nearly the noise: only a network that predicts noise says it again."""
    cosine = float(torch.cosine_similarity(x.flatten().double(), output.flatten().double(), dim=0))
    says_noise = teacher.prediction == "eps"
    if (says_noise and cosine < _UNLIKE) or (not says_noise and cosine > _ALIKE):
        meant, should = ("'x0' or 'v'", "be") if says_noise else ("'eps'", "not be")
        warnings.warn(
            f"with prediction={teacher.prediction!r} the answer at the noisiest step should {should} the noise itself; "
            f"its cosine with it is {cosine:.2f}. Was the teacher trained with prediction={meant}, or not at all?",
            stacklevel=4,
        )
