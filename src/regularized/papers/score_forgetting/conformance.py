"""Golden vectors of the authors' losses, with toy networks linear in the channels, and of the one-step sample."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regularized.evidence.conformance import Case, UnknownCase
from regularized.unlearning.score_forgetting.diffusion import ConditionalDiffusion, OneStepGenerator
from regularized.unlearning.score_forgetting.loss import eps_matching_loss, sid_generator_loss
from regularized.unlearning.score_forgetting.schedule import NoiseSchedule


def tolerance(case: Case, output: str) -> float:
    """The authors' code rounds the scale of the generator's loss to single precision."""
    return {"g_loss": 1e-6, "grad_x0": 1e-5}.get(output, 1e-12)


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Outputs of a case, by what it has.

    Raises:
        UnknownCase: it is neither of a loss nor of the one-step sample.
    """
    if case.has("in/xi", "in/eps_pred", "hp/t_init"):
        computed = _one_step(case)
    elif not case.has("in/x0", "in/noise", "in/t", "in/class", "in/sg_W", "in/sg_E"):
        raise UnknownCase(case)
    elif case.has("hp/alpha", "in/p_W", "in/p_E"):
        computed = _generator_loss(case)
    else:
        computed = _fake_loss(case)
    return {name: tensor.detach().numpy() for name, tensor in computed.items()}


class _Linear(nn.Module):
    """The toy network: channels mixed by W, and a row of E for the class that grows with the step."""

    def __init__(self, weight: Tensor, embedding: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.embedding = nn.Parameter(embedding)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, C, ...)."""
        row = self.embedding[labels] * (1.0 + t.to(x_t.dtype) / 1000.0)[:, None]
        return torch.einsum("oc,bc...->bo...", self.weight, x_t) + row.view(*row.shape, *[1] * (x_t.ndim - 2))


class _Said(nn.Module):
    """A network that has said already what it has to say."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The output."""
        assert isinstance(self.output, Tensor)
        return self.output


def _diffusion(case: Case, name: str) -> ConditionalDiffusion:
    network = _Linear(_tensor(case, f"{name}_W"), _tensor(case, f"{name}_E"))
    shape = case.inputs["x0"].shape[1:]
    return ConditionalDiffusion(network, shape=shape, num_classes=len(network.embedding), schedule=_schedule(case))


def _schedule(case: Case) -> NoiseSchedule:
    beta_start, beta_end = case.number("beta_start", 1e-4), case.number("beta_end", 0.02)
    return NoiseSchedule.linear(int(case.number("T", 1000)), beta_start=beta_start, beta_end=beta_end)


def _fake_loss(case: Case) -> dict[str, Tensor]:
    fake, noise, t = _diffusion(case, "sg"), _tensor(case, "noise"), _tensor(case, "t")
    x_t = fake.schedule.add_noise(_tensor(case, "x0"), noise, t)
    loss = eps_matching_loss(fake.noise_in(x_t, t, _tensor(case, "class")), noise).mean()
    by_weight, by_embedding = torch.autograd.grad(loss, list(fake.parameters()))
    return {"sg_loss": loss, "sg_grad_W": by_weight, "sg_grad_E": by_embedding}


def _generator_loss(case: Case) -> dict[str, Tensor]:
    teacher, fake, t = _diffusion(case, "p"), _diffusion(case, "sg"), _tensor(case, "t")
    labels = _tensor(case, "class")
    asked = _tensor(case, "override_class") if case.number("teacher_uses_override", 0) else labels
    through = not case.number("use_diffinst", 0)
    x0 = _tensor(case, "x0").requires_grad_()
    x_t = fake.schedule.add_noise(x0, _tensor(case, "noise"), t)
    with torch.set_grad_enabled(through):
        p, s = teacher.denoised(x_t, t, asked), fake.denoised(x_t, t, labels)
    loss = sid_generator_loss(p, s, x0, alpha=case.number("alpha") if through else 1.0).mean()
    return {"g_loss": loss, "grad_x0": torch.autograd.grad(loss, x0)[0]}


def _one_step(case: Case) -> dict[str, Tensor]:
    noise = _tensor(case, "xi")
    said = ConditionalDiffusion(
        _Said(_tensor(case, "eps_pred")), shape=noise.shape[1:], num_classes=1, schedule=_schedule(case)
    )
    generator = OneStepGenerator(said, t_init=int(case.number("t_init")))
    labels = torch.zeros(len(noise), dtype=torch.long)
    return {"x_t": generator.noised_input(noise), "x0": generator(noise, labels)}


def _tensor(case: Case, name: str) -> Tensor:
    return torch.tensor(case.inputs[name])
