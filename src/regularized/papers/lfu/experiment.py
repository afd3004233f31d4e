"""Is a network fine-tuned with LfU harder to break, as good at its task, and does it forget less?

*Images.* A perceptron (64-128-128-128-128-10, GELU) that knows 900 images of Fashion-MNIST as 8 x 8 pixels, of each
seed's own, is fine-tuned on 50 of them rotated by 45 degrees with a LoRA of rank 8 on its hidden layers. Measured:
accuracy on rotated test images (``accuracy_kept``, ``accuracy_gain``), on upright ones (``other_skills``), and what
five normalised gradient steps of length 0.1 on wrong labels take away (``adversarial_fine_tuning``). Beside plain
fine-tuning: noise on the inputs, sharpness-aware minimisation (``than_sam``), LfU with the direction of another batch,
a LoRA beside, or offsets; and the control ``lfu_random``, which steps as far in a random direction: everything but the
idea (``direction_matters``).

*Language.* SmolLM2-135M-Instruct in bfloat16 with a float32 LoRA (stock PEFT, rank 8, alpha 16, all linear layers) is
fine-tuned on ten short blocks of the Python reference. Measured: loss on other blocks of it (``language_task``),
how much the loss on news articles rises (``language_forgetting``), how much five steps on shuffled tokens raise
the loss (``language_harm``), and how the loss varies with the words that introduce a text (``prompt_wording``). Texts
are few: each seed draws blocks from the same pool again.

On images each arm has as many trials on validation data; on language both run at equal settings. Strength and length of
LfU's step are the published ones, 5 and 0.1. Refuted by an interval below the smallest effect of the card. Seventeen
minutes on one core, twelve of them for the language model. *Paper* scale: Llama-3.1-8B on GSM8K, where they lie and a
large GPU is.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets import data_folder, eight_by_eight
from regularized.evidence.datasets.samples import eight_by_eight_name, resplit
from regularized.evidence.experiment import About, Measurements, Seeds, Tuning, Unavailable, data_fingerprint
from regularized.evidence.models import seeded
from regularized.evidence.pretrained import byte_tokens, smollm2, smollm2_tokenizer, tiny_llama
from regularized.evidence.texts import module_docstrings, news_articles, python_topics, token_blocks
from regularized.fine_tuning.lfu.regularizer import LfU
from regularized.mechanisms.ascent import ascent_direction, moved
from regularized.training.progress import Progress, cosine, warmup

PACKAGES = {"peft": "peft"}
SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "data": "digits",
        "test": 897,
        "base_steps": 60,
        "steps": 4,
        "language": "tiny",
        "epochs": 1,
        "train_blocks": 4,
        "blocks": 2,
    },
    # Ours: 300 steps on 50 images, as in the pilot; for the language model what ten seeds can afford.
    "laptop": {
        "data": "fashion_mnist",
        "test": 2000,
        "base_steps": 1000,
        "steps": 300,
        "language": "smollm2",
        "epochs": 3,
        "train_blocks": 10,
        "blocks": 8,
    },
    # The official scripts: lr 1e-4, cosine with 10 % warm-up, 3 epochs, batches of 4 x 4, 2048 tokens, LoRA r 8.
    "paper": {"language": "llama", "epochs": 3, "batch": 4, "accumulate": 4, "length": 2048, "lr": 1e-4},
}

DEFAULTS: dict[str, Any] = {
    "problem": "images",
    "method": "plain",
    "lr": 0.01,
    "direction": "same",
    "aux": "self",
    "alpha": 0.1,
    "strength": None,  # the published one
    "noise": 0.0,
    "radius": 0.0,
}

SEEDS = Seeds(
    first=100,
    why="In an earlier edition 15 seeds, from 0, each split the same 1,797 digits again; now ten have images of "
    "their own.",
)

_LFU: dict[str, Any] = {"method": "lfu"}
# lr (and the noise, and the radius) are the best of TUNING; alpha and lambda are the paper's.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 2e-3},
    "noise": {"method": "noise", "noise": 0.05, "lr": 3e-3},
    "sam": {"method": "sam", "radius": 0.1, "lr": 0.01},
    "lfu_random": {**_LFU, "direction": "random", "lr": 3e-3},
    "lfu_other_batch": {**_LFU, "direction": "other", "lr": 3e-3},
    "lfu_lora": {**_LFU, "aux": "lora", "lr": 2e-3},
    "lfu_steering": {**_LFU, "aux": "steering", "lr": 2e-3},
    "lfu": {**_LFU, "lr": 3e-3},
    # Equal settings, not tuned (a trial of both takes a minute): lr is the better of 1e-3 and 3e-3 for plain LoRA.
    "language_plain": {"problem": "language", "lr": 1e-3},
    "language_lfu": {**_LFU, "problem": "language", "lr": 1e-3},
}

# At paper scale the published rate replaces what was tuned on the laptop.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {"paper": {arm: {"lr": SCALES["paper"]["lr"]} for arm in ARMS}}

# The last three of each grid since the best lay at an edge.
_RATES = [{"lr": lr} for lr in (3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 3e-4, 1e-3, 2e-3)]
TUNING = Tuning(
    metric="validation_accuracy",  # of 200 rotated images that are set aside
    direction="higher",
    grids={
        **dict.fromkeys(("plain", "lfu_random", "lfu_other_batch", "lfu_lora", "lfu_steering", "lfu"), _RATES),
        "noise": [
            {"noise": noise, "lr": lr}
            for noise, lr in (*product((0.1, 0.2, 0.4), (1e-2, 3e-2)), (0.05, 3e-3), (0.1, 3e-3), (0.2, 3e-3))
        ],
        "sam": [
            {"radius": radius, "lr": lr}
            for radius, lr in (*product((0.1, 0.2, 0.4), (1e-2, 3e-2)), (0.05, 3e-3), (0.05, 1e-2), (0.1, 3e-3))
        ],
    },
)


def about(s: Mapping[str, Any]) -> About:
    """Small images; or texts, drawn from one pool again by each seed."""
    if s["language"] == "llama":
        return About("GSM8K, 7,473 questions", 7473, "Llama-3.1-8B", 8_000_000_000, 1319 / 7473)
    if s["problem"] == "images":
        again = resplit(s["data"], train=900, test=s["test"])
        return About(f"50 rotated {eight_by_eight_name(s['data'])}", 50, "MLP, 59k weights, LoRA", 59_000, again)
    model, weights = ("SmolLM2, 135M weights, LoRA", 135_000_000)
    if s["language"] == "tiny":
        model, weights = "Llama of a few thousand weights", 10_000
    blocks = s["train_blocks"]
    return About(
        f"{blocks} blocks of {LENGTH} tokens of Python's reference", blocks, model, weights, s["blocks"] / blocks
    )


def run(s: Mapping[str, Any], seed: int) -> Measurements:
    """Fine-tune and measure one arm with one seed; accuracies in per cent, losses in nats.

    Raises:
        Unavailable: peft, transformers or the language model is missing; at paper scale, data, weights or a GPU.
    """
    if s["language"] == "llama":
        return _paper(seed, s)
    return _images(seed, s) if s["problem"] == "images" else _language(seed, s)


def with_lora(model: nn.Module, targets: Any) -> nn.Module:
    """A stock LoRA of rank 8 and scale 2 on the targets; everything else is frozen."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Unavailable('peft is not installed: pip install "regularized[peft]"') from error
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    return adapted.train()


def fine_tune(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    layers: Any,
    s: Mapping[str, Any],
    *,
    others: Iterator[Any] | None = None,
    schedule: Callable[[Progress], float] | None = None,
    accumulate: int = 1,
) -> None:
    """A user's loop; each method is the few lines that it takes there."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=s["lr"], weight_decay=0.0)
    lfu = LfU(model, layers=layers, aux=s["aux"], alpha=s["alpha"], strength=s["strength"])
    total = len(batches) // accumulate
    for number in range(total):
        window = batches[number * accumulate : (number + 1) * accumulate]
        for group in optimizer.param_groups:
            group["lr"] = s["lr"] * (1.0 if schedule is None else schedule(Progress(number, total)))
        if s["method"] == "lfu":
            if s["direction"] == "other":
                assert others is not None
                other = next(others)
                lfu.ascend(lambda m, other=other: loss(m, other))  # type: ignore[misc]
            elif s["direction"] == "random":  # the gradient of this is a random vector
                lfu.ascend(lambda m: torch.stack([(p * torch.randn_like(p)).sum() for p in parameters]).sum())
            for batch in window:
                with lfu.record():
                    value = loss(model, batch)
                (value / accumulate).backward()
            lfu.backward()
        else:
            for batch in window:
                (loss(model, batch) / accumulate).backward()
            if s["method"] == "sam":
                uphill = ascent_direction([p.grad for p in parameters if p.grad is not None], s["radius"])
                optimizer.zero_grad()
                with moved(parameters, uphill):
                    for batch in window:
                        (loss(model, batch) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()


def harm(model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor], length: float) -> None:
    """Normalised gradient steps on wrong data, as somebody takes who fine-tunes with a bad purpose or bad labels."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), parameters)
        with torch.no_grad():
            for parameter, uphill in zip(parameters, ascent_direction(gradients, length), strict=True):
                parameter.sub_(uphill)


# -- images -----------------------------------------------------------------------------------------------


def rotated(x: Tensor, degrees: float = 45.0) -> Tensor:
    """(N, 64) images of 8 x 8 turned round their centre; what comes from outside is background, 0."""
    angle = torch.tensor(degrees).deg2rad()
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    images = x.view(-1, 1, 8, 8)
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).flatten(1)


HIDDEN = ("0", "2", "4", "6")  # the linear layers that are adapted
STATES = ("1", "3", "5", "7")  # the states behind each GELU


def _perceptron() -> nn.Sequential:
    parts: list[nn.Module] = []
    for fan_in, fan_out in ((64, 128), (128, 128), (128, 128), (128, 128)):
        parts += [nn.Linear(fan_in, fan_out), nn.GELU()]
    return nn.Sequential(*parts, nn.Linear(128, 10))


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@lru_cache(maxsize=4)
def _base(
    name: str, seed: int, test: int, steps: int
) -> tuple[nn.Sequential, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The network before fine-tuning, and its training and test images: AdamW with 1e-3, batches of 64."""
    pixels, labels = eight_by_eight(name, seed, 900 + test)
    images = pixels.float()
    x, y = images[:900], labels[:900]
    model = seeded(seed, _perceptron)
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    draws = torch.Generator().manual_seed(10 * seed + 1)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=draws)
        _cross_entropy(model, (x[rows], y[rows])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, (x, y), (images[900:], labels[900:])


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    share = (model(x).argmax(-1) == y).double().mean()
    model.train()
    return 100.0 * float(share)


def _images(seed: int, s: Mapping[str, Any]) -> Measurements:
    trained, (images, labels), (upright, test_y) = _base(s["data"], seed, s["test"], s["base_steps"])
    base = copy.deepcopy(trained)
    x, y = rotated(images[:50]), labels[:50]
    held_x, held_y = rotated(images[50:250]), labels[50:250]
    test_x = rotated(upright)
    draws = torch.Generator().manual_seed(10 * seed + 2)

    def drawn(number: int, draws: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        rows = torch.randint(len(x), (number, 16), generator=draws)
        return [(x[r], y[r]) for r in rows]

    batches = drawn(s["steps"], draws)
    others = iter(drawn(s["steps"], draws))
    torch.manual_seed(seed)
    before = _accuracy(base, test_x, test_y)
    model = with_lora(base, list(HIDDEN))
    layers = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in STATES]
    if s["method"] == "noise":
        noise = [(inputs + s["noise"] * torch.randn_like(inputs), right) for inputs, right in batches]
        fine_tune(model, noise, _cross_entropy, layers, s)
    else:
        fine_tune(model, batches, _cross_entropy, layers, s, others=others)
    accuracy = _accuracy(model, test_x, test_y)
    metrics = {
        "test_accuracy": accuracy,
        "validation_accuracy": _accuracy(model, held_x, held_y),
        "old_skill_accuracy": _accuracy(model, upright, test_y),
        "train_accuracy": _accuracy(model, x, y),
        "accuracy_before": before,
    }
    tuned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    after = []
    for _ in range(4):  # four choices of wrong labels, each from the tuned model
        wrong = (y + torch.randint(1, 10, y.shape, generator=draws)) % 10
        harm(model, [(x, wrong)] * 5, _cross_entropy, 0.1)
        after.append(_accuracy(model, test_x, test_y))
        model.load_state_dict(tuned, strict=False)
    metrics["accuracy_after_harm"] = sum(after) / len(after)
    metrics["accuracy_drop"] = accuracy - metrics["accuracy_after_harm"]
    return Measurements(metrics, data=data_fingerprint(x.numpy(), y.numpy(), test_x.numpy()))


# -- language ---------------------------------------------------------------------------------------------

LENGTH = 64
HARM = 0.3  # length of a harmful step: five of them raise the loss of a plainly tuned model by some tenths of a nat
PROMPTS = (
    "Python reference.\n\n",
    "The following is a section of the documentation of the Python language:\n\n",
    "Read this text about programming and go on in the same style.\n\n",
    "user: Explain this part of Python to me, please.\nassistant: ",
)


@lru_cache(maxsize=1)
def _texts(kind: str) -> tuple[Tensor, Tensor, Callable[[str], Tensor]]:
    """Blocks of the domain and of general text, and what turns text into tokens."""
    if kind == "tiny":
        texts = module_docstrings()
        half = len(texts) // 2
        domain, general, tokenize = texts[:half], texts[half:], byte_tokens
    else:
        tokenizer = smollm2_tokenizer()
        domain, general = python_topics(), news_articles()

        def tokenize(text: str) -> Tensor:
            return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)

    return token_blocks(domain, tokenize, LENGTH), token_blocks(general, tokenize, LENGTH), tokenize


def _language_loss(model: Any, ids: Tensor) -> Tensor:
    value: Tensor = model(input_ids=ids, labels=ids).loss
    return value


@torch.no_grad()
def _mean_loss(model: Any, blocks: Tensor, prompt: Tensor | None = None) -> float:
    """Mean loss of the blocks' own tokens but the first, whatever stands before them."""
    model.eval()
    losses = []
    for part in blocks.split(4):
        ids = part if prompt is None else torch.cat([prompt.expand(len(part), -1), part], dim=1)
        labels = ids.clone()
        labels[:, : ids.shape[1] - LENGTH + 1] = -100
        losses.append(model(input_ids=ids, labels=labels).loss.float() * len(part))
    model.train()
    return float(torch.stack(losses).sum()) / len(blocks)


def _language(seed: int, s: Mapping[str, Any]) -> Measurements:
    domain, general, tokenize = _texts(s["language"])
    draws = torch.Generator().manual_seed(10 * seed + 3)
    n, m = s["train_blocks"], s["blocks"]
    chosen = domain[torch.randperm(len(domain), generator=draws)[: n + 2 * m]]
    train, held, test = chosen[:n], chosen[n : n + m], chosen[n + m :]
    news = general[torch.randperm(len(general), generator=draws)[:m]]
    base = tiny_llama(seed) if s["language"] == "tiny" else smollm2(torch.bfloat16)
    torch.manual_seed(seed)
    model = with_lora(base, "all-linear")
    before = {"domain": _mean_loss(model, test), "general": _mean_loss(model, news)}
    order = torch.cat([torch.randperm(n, generator=draws) for _ in range(s["epochs"])])
    batches = [train[i : i + 1] for i in order.tolist()]
    fine_tune(model, batches, _language_loss, "all", s, schedule=warmup(cosine(), 0.1))
    domain_loss, general_loss = _mean_loss(model, test), _mean_loss(model, news)
    by_prompt = torch.tensor([_mean_loss(model, test[: m // 2], tokenize(p)[None]) for p in PROMPTS])
    metrics = {
        "domain_loss": domain_loss,
        "domain_gain": before["domain"] - domain_loss,
        "validation_loss": _mean_loss(model, held),
        "general_loss": general_loss,
        "general_loss_rise": general_loss - before["general"],
        "prompt_std": float(by_prompt.std()),
    }
    shuffled = [block[torch.randperm(LENGTH, generator=draws)][None] for block in train[:5]]
    harm(model, shuffled, _language_loss, HARM)
    metrics["loss_rise_after_harm"] = _mean_loss(model, test) - domain_loss
    return Measurements(metrics, data=data_fingerprint(train.numpy(), test.numpy(), news.numpy()))


# -- the paper's --------------------------------------------------------------------------------------------


def _paper(seed: int, s: Mapping[str, Any]) -> Measurements:
    """Llama-3.1-8B on GSM8K; accuracy of greedy answers, and the loss on general text before and after."""
    folder = data_folder()
    wanted = {
        "llama-3.1-8b": "the weights of meta-llama/Llama-3.1-8B in Hugging Face's form",
        "gsm8k/train.jsonl": "GSM8K's train.jsonl (github.com/openai/grade-school-math)",
        "gsm8k/test.jsonl": "GSM8K's test.jsonl",
    }
    missing = [f"{folder / name}: {what}" for name, what in wanted.items() if not (folder / name).exists()]
    if missing:
        raise Unavailable(f"put there (or set REGULARIZED_DATA): {'; '.join(missing)}")
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60e9:
        raise Unavailable("the paper scale fine-tunes 8 billion weights and needs a CUDA GPU of 60 GB or more")
    if s["method"] == "noise":
        raise Unavailable("the arm `noise` disturbs pixels; it has no meaning on text")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "llama-3.1-8b")
    llama: Any = AutoModelForCausalLM.from_pretrained(folder / "llama-3.1-8b", dtype=torch.bfloat16)
    model = with_lora(llama.to("cuda"), "all-linear")
    rows = {
        part: [json.loads(line) for line in (folder / "gsm8k" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "test")
    }

    def question(row: Mapping[str, str]) -> str:
        return f"### Instruction:\n{row['question']}\n\n### Response:\n"  # the alpaca template

    def batch(part: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        texts = [(tokenizer(question(r)).input_ids, tokenizer(r["answer"]).input_ids[1:]) for r in part]
        both = [torch.tensor([*q, *a, tokenizer.eos_token_id][: s["length"]]) for q, a in texts]
        ids = nn.utils.rnn.pad_sequence(both, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(both, batch_first=True, padding_value=-100)
        for row, (q, _) in zip(labels, texts, strict=True):
            row[: len(q)] = -100
        return {"input_ids": ids.cuda(), "labels": labels.cuda()}

    def loss(net: Any, part: Sequence[Mapping[str, str]]) -> Tensor:
        value: Tensor = net(**batch(part)).loss
        return value

    draws = torch.Generator().manual_seed(seed)

    def shuffled() -> Iterator[list[Mapping[str, str]]]:
        order = torch.randperm(len(rows["train"]), generator=draws).tolist()
        for start in range(0, len(order) - s["batch"] + 1, s["batch"]):
            yield [rows["train"][i] for i in order[start : start + s["batch"]]]

    batches = [part for _ in range(s["epochs"]) for part in shuffled()]
    others = (part for _ in range(s["epochs"]) for part in shuffled())
    general = token_blocks(news_articles(), lambda text: tokenizer(text).input_ids, LENGTH)[:200].cuda()
    before = _mean_loss(model, general)
    schedule = warmup(cosine(), 0.1)
    fine_tune(model, batches, loss, "all", s, others=others, schedule=schedule, accumulate=s["accumulate"])
    model.eval()
    hits = 0
    for row in rows["test"]:
        ids = torch.tensor([tokenizer(question(row)).input_ids]).cuda()
        with torch.no_grad():
            answer = model.generate(input_ids=ids, max_new_tokens=400, do_sample=False)  # type: ignore[operator]
        said = re.findall(r"-?[\d,]*\.?\d+", str(tokenizer.decode(answer[0, ids.shape[1] :])))
        hits += bool(said) and said[-1].replace(",", "") == row["answer"].split("#### ")[-1].replace(",", "")
    metrics = {
        "test_accuracy": 100.0 * hits / len(rows["test"]),
        "general_loss_rise": _mean_loss(model, general) - before,
    }
    return Measurements(metrics, data=data_fingerprint(general.cpu().numpy()))
