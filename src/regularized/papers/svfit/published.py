"""The paper's own set-up: RoBERTa on GLUE and a vision transformer on images, for a machine with a GPU."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.evidence.datasets import cifar, data_folder
from regularized.evidence.experiment import Measurements, Unavailable, data_fingerprint
from regularized.fine_tuning.svfit.model import inject_svfit, svfit_param_groups

__all__ = ["run_published"]

# Columns of the sentences and of the label in GLUE's own files.
_TASKS: dict[str, tuple[tuple[str, ...], str]] = {
    "SST-2": (("sentence",), "label"),
    "MRPC": (("#1 String", "#2 String"), "Quality"),
    "QNLI": (("question", "sentence"), "label"),
    "RTE": (("sentence1", "sentence2"), "label"),
}


def run_published(s: Mapping[str, Any], seed: int) -> Measurements:
    """One arm on a GLUE task (arms without prefix, and ``few_``), or on CIFAR-10 with a ViT (``vision_``).

    Raises:
        Unavailable: a model, data, a package or a GPU is missing, or the arm is a toy of the laptop.
    """
    if s["domain"] != "rotated" or s["method"] == "head" or s["layers"] is not None:
        raise Unavailable("this arm belongs to the laptop's toy; the paper has nothing like it")
    images = s["problem"] == "vision"
    folder = data_folder() / (s["vision"] if images else s["model"])
    if not (folder / "config.json").is_file():
        raise Unavailable(
            f"the model is not at {folder}: put the checkpoint of {folder.name} (config.json, safetensors"
            f"{'' if images else ', tokenizer'}) there, or set REGULARIZED_DATA"
        )
    if not torch.cuda.is_available():
        raise Unavailable(f"the paper scale fine-tunes {folder.name} for {s['epochs']} epochs and needs a CUDA GPU")
    try:
        import peft  # noqa: F401
        import transformers
    except ImportError as error:
        raise Unavailable(f'needs {error.name}: pip install "regularized[peft]"') from error
    torch.manual_seed(seed)
    if images:
        split = cifar(10)
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, num_labels=10, ignore_mismatched_sizes=True
        )
        train, test = {"pixel_values": split.train_x}, {"pixel_values": split.test_x}
        train_y, test_y = split.train_y, split.test_y
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        (train, train_y), (test, test_y) = (_glue(s["task"], part, tokenizer) for part in ("train", "dev"))
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]
    if s["labels"] == 100:
        rest = rest[:100]
    adapted, groups = _adapted(model, s)
    adapted.cuda()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    curve: list[tuple[float, float]] = []
    for epoch in range(s["epochs"]):
        adapted.train()
        for rows in rest[torch.randperm(len(rest))].split(s["batch"]):
            loss = F.cross_entropy(_logits(adapted, train, rows), train_y[rows].cuda())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append((epoch + 1, _accuracy(adapted, test, test_y, torch.arange(len(test_y)))))
    metrics = {
        "new_accuracy": curve[-1][1],
        "validation_accuracy": _accuracy(adapted, train, train_y, held),
        "trainable_parameters": float(sum(p.numel() for p in groups[0]["params"])),
    }
    return Measurements(metrics, {"new_accuracy": curve}, data_fingerprint(train_y.numpy(), np.array(len(test_y))))


def _adapted(model: nn.Module, s: Mapping[str, Any]) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Query and value projections are adapted, the head is trained whole."""
    import peft

    if s["method"] == "svfit":
        inject_svfit(model, rank=s["rank"], target_modules=["query", "value"], also_train=["classifier"])
        ours = svfit_param_groups(model, lr=s["lr"])
    elif s["method"] == "full":
        ours = [{"params": [p for n, p in model.named_parameters() if "classifier" not in n], "lr": s["lr"]}]
    elif s["method"] in ("lora", "pissa"):
        initial: Any = "pissa" if s["method"] == "pissa" else True
        config = peft.LoraConfig(
            r=s["rank"],
            lora_alpha=s["rank"],
            target_modules=["query", "value"],
            init_lora_weights=initial,
            modules_to_save=["classifier"],
        )
        model = cast(nn.Module, peft.get_peft_model(cast(Any, model), config))
        ours = [{"params": [p for n, p in model.named_parameters() if "lora_" in n], "lr": s["lr"]}]
    else:
        raise Unavailable(
            f"{s['method']} is a comparison of the laptop's; the paper has LoRA, PiSSA and full fine-tuning"
        )
    head = [p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad]
    return model, [*ours, {"params": head, "lr": 1e-3}]


def _glue(task: str, part: str, tokenizer: Any) -> tuple[dict[str, Tensor], Tensor]:
    path = Path(data_folder()) / "glue" / task / f"{part}.tsv"
    if not path.is_file():
        raise Unavailable(f"GLUE is not here: put the tab-separated files of {task} at {path.parent}")
    columns, label = _TASKS[task]
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = {name: k for k, name in enumerate(sorted({row[label] for row in rows}))}
    texts = [[row[column] for row in rows] for column in columns]
    encoded = tokenizer(*texts, padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    return dict(encoded), torch.tensor([names[row[label]] for row in rows])


def _logits(model: nn.Module, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    batch = {name: tensor[rows].cuda() for name, tensor in inputs.items()}
    if "pixel_values" in batch:
        big = F.interpolate(batch["pixel_values"], size=(224, 224), mode="bilinear")
        batch["pixel_values"] = (big - 0.5) / 0.5
    return cast(Tensor, model(**batch).logits)


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, rows: Tensor) -> float:
    model.eval()
    hits = sum(int((_logits(model, inputs, part).argmax(1).cpu() == labels[part]).sum()) for part in rows.split(128))
    return 100.0 * hits / len(rows)
