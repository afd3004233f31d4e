"""The paper's scale: the U-Net of Stable Diffusion 1.5 learns a style, with FID and CLIP score at the end.

Wanted under ``REGULARIZED_DATA`` (default ``~/.cache/regularized/data``), nothing is downloaded::

    stable-diffusion-v1-5/        the model in the layout of diffusers
    clip-vit-large-patch14/       openai/clip-vit-large-patch14 in the layout of transformers
    sara-style/NAME.png NAME.txt  images of one style with their captions (the paper: "<style> style," and BLIP's)
    sara-prompts.txt              prompts of the evaluation, one a line (the paper: 500)

and diffusers, transformers, torchmetrics with torch-fidelity, and a CUDA GPU of 24 GiB. The balance of a run is the
mean of style and prompt fidelity, each from 0 to 100 between fixed bounds about the paper's Table 1, since the paper's
VLHI is normalised over the very group that is compared, which a single run does not know.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets import data_folder
from regularized.evidence.experiment import Measurements, Unavailable, data_fingerprint
from regularized.fine_tuning.sara.entries import SparseEntries
from regularized.fine_tuning.sara.penalty import nuclear_norm
from regularized.fine_tuning.sara.selection import magnitude_threshold
from regularized.fine_tuning.sara.term import SaRA

__all__ = ["run_paper"]

DEVICE = "cuda"
FID_BOUNDS = (170.0, 130.0)  # style fidelity 0 and 100: the worst and best of Table 1, rounded outwards
ZEROING = {0.2: "test_accuracy_after_zeroing", 0.5: "test_accuracy_after_zeroing_half"}
CLIP_BOUNDS = (25.0, 28.5)  # prompt fidelity 0 and 100, likewise


def run_paper(s: Mapping[str, Any], seed: int) -> Measurements:
    """Fine-tune one arm and measure.

    Args:
        s: settings of arm and scale.
        seed: of noise, order and selection.

    Raises:
        Unavailable: with all that is missing.
    """
    root = data_folder()
    _check_available(root)
    diffusers = import_module("diffusers")

    torch.manual_seed(seed)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(root / "stable-diffusion-v1-5"), safety_checker=None)
    pipe = pipe.to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    latents, embeddings, images = _encoded(pipe, root / "sara-style")
    unet = pipe.unet
    start = {name: p.detach().clone() for name, p in unet.named_parameters()}
    small = {name: p.abs() < s["threshold"] for name, p in start.items()}
    prompts = (root / "sara-prompts.txt").read_text(encoding="utf-8").splitlines()
    if s["train"]:
        optimizer, finish = _prepared(unet, s, seed)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s["steps"])
        for step in range(s["steps"]):
            rows = torch.randint(len(latents), (s["batch"],), device=DEVICE)
            noise = torch.randn_like(latents[rows])
            times = torch.randint(schedule.config.num_train_timesteps, (len(rows),), device=DEVICE)
            noisy = schedule.add_noise(latents[rows], noise, times)
            F.mse_loss(unet(noisy, times, embeddings[rows]).sample, noise).backward()
            optimizer.step()
            optimizer.zero_grad()
            cosine.step()
            finish(step)
    metrics: dict[str, float] = {}
    for share, name in ZEROING.items() if s["zero"] else ((0.0, ""),):
        if share:
            _zero(unet, s["zero"], share, seed)
        fid, clip = _fidelity(pipe, images, prompts, root)
        style, prompt = _between(fid, FID_BOUNDS), _between(clip, CLIP_BOUNDS)
        of_both = {"new_accuracy": style, "old_accuracy": prompt, "balance": (style + prompt) / 2}
        metrics |= {name: prompt} if share else {"fid": fid, "clip_score": clip, **of_both}
    if not s["zero"] and not s["train"]:
        metrics |= dict.fromkeys(ZEROING.values(), metrics["old_accuracy"])
    now = dict(unet.named_parameters())
    if now.keys() == start.keys():
        still = sum(int((now[name].abs() < s["threshold"])[mask].sum()) for name, mask in small.items())
        metrics["share_still_small"] = 100.0 * still / sum(int(mask.sum()) for mask in small.values())
        norms = [nuclear_norm(now[n].detach() * m) for n, m in small.items() if m.ndim == 2 and min(m.shape) > 64]
        metrics["nuclear_norm"] = float(torch.stack(norms).mean())
    return Measurements(metrics, data=data_fingerprint(images.cpu().numpy()), curve_unit="step")


def _check_available(root: Path) -> None:
    missing = [f"pip install {name}" for name in ("diffusers", "transformers", "torchmetrics") if not find_spec(name)]
    wanted = ("stable-diffusion-v1-5", "clip-vit-large-patch14", "sara-style", "sara-prompts.txt")
    missing += [str(root / name) for name in wanted if not (root / name).exists()]
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU of 24 GiB")
    if missing:
        raise Unavailable(
            "the paper scale fine-tunes Stable Diffusion 1.5; missing: " + ", ".join(missing) + ". The docstring of "
            "regularized.papers.sara.stable_diffusion says what belongs where; REGULARIZED_DATA names another folder"
        )


@torch.no_grad()
def _encoded(pipe: Any, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, text embeddings and images (uint8) of the style."""
    load_image = import_module("diffusers.utils").load_image
    latents, embeddings, images = [], [], []
    for path in sorted(folder.glob("*.png")):
        pixels = pipe.image_processor.preprocess(load_image(str(path)), 512, 512).to(DEVICE)
        latents.append(pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        embeddings.append(pipe.encode_prompt(caption, DEVICE, 1, do_classifier_free_guidance=False)[0])
        images.append(((pixels + 1) * 127.5).to(torch.uint8).cpu())
    return torch.cat(latents), torch.cat(embeddings), torch.cat(images)


def _prepared(unet: Any, s: Mapping[str, Any], seed: int) -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=s["lr"], weight_decay=1e-2)

    def nothing(step: int) -> None:
        pass

    if s["train"] == "all":
        return adamw(unet.parameters()), nothing
    if s["train"] == "lora":
        from peft import LoraConfig

        unet.requires_grad_(False)
        # Rank 256 in the attention layers has about the 50M weights of the table's first block.
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=256, lora_alpha=256, target_modules=layers))
        return adamw([p for p in unet.parameters() if p.requires_grad]), nothing
    if s["train"] == "sara":
        sara = SaRA(
            unet,
            threshold=s["threshold"],
            total_steps=s["steps"],
            reselect_at=s["reselect_at"],
            lambda_rank=s["lambda_rank"],
            polar="newton_schulz",
        )
        return sara.bind(adamw(sara.parameters())), nothing
    named = dict(unet.named_parameters())
    total = sum(p.numel() for p in named.values())
    fraction = sum(int((p.abs() < s["threshold"]).sum()) for p in named.values()) / total
    least = magnitude_threshold(named.values(), 1.0 - fraction)
    draws = torch.Generator(DEVICE).manual_seed(seed)

    def chosen(parameter: Tensor) -> Tensor:
        if s["train"] == "largest":
            return torch.ge(parameter.detach().abs(), least)
        return torch.lt(torch.rand(parameter.shape, generator=draws, device=DEVICE), fraction)

    entries = SparseEntries(named, chosen)
    return adamw(entries.parameters()), lambda step: entries.write()


@torch.no_grad()
def _zero(unet: nn.Module, which: str, share: float, seed: int) -> None:
    """Set a share of all weights to zero."""
    named = dict(unet.named_parameters())
    draws = torch.Generator(DEVICE).manual_seed(seed)
    rank = share if which == "smallest" else 1.0 - share
    bound = magnitude_threshold(named.values(), rank)
    for p in named.values():
        if which == "random":
            gone = torch.rand(p.shape, generator=draws, device=DEVICE) < share
        else:
            gone = p.abs() < bound if which == "smallest" else p.abs() >= bound
        p[gone] = 0.0


@torch.no_grad()
def _fidelity(pipe: Any, style: Tensor, prompts: list[str], root: Path) -> tuple[float, float]:
    """FID to the style's images, and 100 times the mean cosine of image and prompt in CLIP."""
    transformers: Any = import_module("transformers")
    fid = import_module("torchmetrics.image.fid").FrechetInceptionDistance(feature=2048).to(DEVICE)
    for part in style.split(16):
        fid.update(part.to(DEVICE), real=True)
    folder = str(root / "clip-vit-large-patch14")
    clip = transformers.CLIPModel.from_pretrained(folder).to(DEVICE).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    scores = []
    for number, part in enumerate(_parts([prompt for prompt in prompts if prompt.strip()], 8)):
        noise = torch.Generator(DEVICE).manual_seed(number)  # the same for every arm
        made = pipe(part, num_inference_steps=50, generator=noise, output_type="pt").images
        pixels = (made * 255).to(torch.uint8)
        fid.update(pixels, real=False)
        inputs = processor(text=part, images=list(pixels.cpu()), return_tensors="pt", padding=True, truncation=True)
        out = clip(**inputs.to(DEVICE))
        scores.append(F.cosine_similarity(out.image_embeds, out.text_embeds))
    return float(fid.compute()), 100.0 * float(torch.cat(scores).mean())


def _parts(items: list[str], size: int) -> Iterator[list[str]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def _between(value: float, bounds: tuple[float, float]) -> float:
    return 100.0 * (value - bounds[0]) / (bounds[1] - bounds[0])
