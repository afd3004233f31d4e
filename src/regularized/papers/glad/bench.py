"""Cost of a step with two gradients, beside plain training of PEFT's LoRA on the same model and batch."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper, trained
from regularized.fine_tuning.glad.classifier import FewShotClassifier
from regularized.fine_tuning.glad.optimizer import GLAD, Mode
from regularized.fine_tuning.glad.peft import add_lora


def _classifier(width: int, layers: int, side: int, classes: int) -> FewShotClassifier:
    import transformers

    tower = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "intermediate_size": 4 * width,
    }
    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 1000, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 999},
        vision_config=tower | {"image_size": side, "patch_size": 8},
        projection_dim=width,
    )
    descriptions = torch.randint(1, 900, (classes, 12), generator=torch.Generator().manual_seed(0))
    return FewShotClassifier(add_lora(transformers.CLIPModel(config)), descriptions)


def _build(
    width: int, layers: int, side: int, classes: int, batch: int, combine: Mode, every: int
) -> tuple[StepFunction, StepFunction]:
    x = torch.randn(batch, 3, side, side).to(device())
    y = torch.arange(batch).to(device()) % classes

    def tuned() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = placed(_classifier, width, layers, side, classes).train()
        return model, torch.optim.AdamW(trained(model), lr=2e-4)

    model, optimizer = tuned()
    steered_model, base = tuned()
    steered = GLAD(base, combine=combine, every=every)

    plain_step = stepper(lambda: F.cross_entropy(model(x), y), optimizer)

    def closure() -> Tensor:
        loss = F.cross_entropy(steered_model(x), y)
        loss.backward()
        return loss

    def method_step() -> None:
        steered.step(closure)

    if every == 1:
        return plain_step, method_step
    # One timed step is a whole period, of `every` steps on both sides.
    return partial(_repeat, plain_step, every), partial(_repeat, method_step, every)


def _repeat(step: StepFunction, times: int) -> None:
    for _ in range(times):
        step()


def workloads() -> list[Workload]:
    """CLIP-like models with LoRA in both towers; the three readings, and a second pass at every fourth step."""
    small, large = (64, 2, 32, 10), (128, 4, 64, 10)
    return [
        Workload("CLIP d 64, 2 blocks, 10 classes, B 16", partial(_build, *small, 16, "interpolate", 1)),
        Workload("CLIP d 128, 4 blocks, 10 classes, B 32", partial(_build, *large, 32, "interpolate", 1)),
        Workload("the same, project", partial(_build, *large, 32, "project", 1)),
        Workload(
            "the same, every fourth step",
            partial(_build, *large, 32, "interpolate", 4),
            note="both sides four steps",
            floor=1.25,
        ),
    ]
