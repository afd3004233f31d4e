"""What both adapters are tried with: terms of every kind, a loop by hand, our own loop; also in two processes."""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from regularized.evidence.processes import run_launched
from regularized.mechanisms.distributed import gather_rows, leave_process_group
from regularized.training import Batch, Compute, CrossEntropy, Logging, Step, Term, Trainer, linear

CLASSES, LENGTH, VOCABULARY, FEATURES = 3, 5, 20, 6
EPOCHS, CLIP, RATE, MOMENTUM = 2, 0.4, 0.3, 0.9
RAMP = linear(0.2, 1.0)


class Mask(Term):
    """Changes the labels, and so what there is to count, before the forward pass."""

    contributes = False

    def transform(self, batch: Batch) -> Batch:
        return dataclasses.replace(batch, targets=masked(batch.targets, batch.index))


def masked(targets, index):
    return torch.where((index % 5 == 0).view(-1, *[1] * (targets.ndim - 1)), -100, targets)


class Penalty(Term):
    """On the weights, once an optimizer step."""

    per_step = True

    def forward(self, step: Step) -> torch.Tensor:
        return penalty(step.model)


def penalty(model):
    return 0.02 * sum(p.square().sum() for p in model.parameters())


class Remember(Term):
    """State for each sample, a parameter with its own learning rate, a generator, and every moment."""

    def __init__(self, samples: int, *, noise: float = 0.0) -> None:
        super().__init__(weight=RAMP)
        self.register_buffer("history", torch.zeros(samples, CLASSES))
        self.register_buffer("moments", torch.zeros(3))  # epochs, steps, largest norm of a gradient
        self.scale = nn.Parameter(torch.ones(CLASSES))
        self.noise = noise
        self.generator = torch.Generator().manual_seed(5)

    def param_groups(self, model):
        return [{"params": self.scale, "lr": RATE / 10}]

    def epoch_start(self, progress) -> None:
        self.moments[0] += 1

    def before_step(self, step) -> None:
        norms = [p.grad.norm() for p in (*step.model.parameters(), self.scale)]
        self.moments[2] = torch.stack([self.moments[2], torch.stack(norms).norm()]).max()

    def after_step(self, step) -> None:
        self.moments[1] += 1

    def forward(self, step: Step) -> torch.Tensor:
        p = probabilities(step.log_probabilities)
        if self.training:
            drawn = self.noise * torch.rand(p.shape, generator=self.generator)
            index, rows = gather_rows(step.index, 0.5 * self.history[step.index] + 0.5 * p.detach() + drawn)
            self.history[index] = rows
            return (p * self.scale - self.history[step.index]).square().sum()
        return p.new_zeros(())


def probabilities(log_p):
    p = log_p.exp()
    return p.mean(1) if p.ndim == 3 else p


class Hidden(Term):
    """On a hidden state."""

    def __init__(self, name: str) -> None:
        super().__init__(weight=0.5)
        self.taps = (name,)

    def forward(self, step: Step) -> torch.Tensor:
        return step.hidden(self.taps[0]).square().flatten(1).mean(1).sum()


def terms(samples: int, tap: str, *, noise: float = 0.0) -> dict[str, nn.Module]:
    return {
        "mask": Mask(),
        "task": CrossEntropy(),
        "penalty": Penalty(),
        "remember": Remember(samples, noise=noise),
        "hidden": Hidden(tap),
    }


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def vectors(samples: int):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    return x, torch.where(torch.rand(samples, generator=generator) < 0.2, -100, y)


def bert(dropout: float = 0.0) -> nn.Module:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    return BertForTokenClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=LENGTH,
            num_labels=CLASSES,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def sentences(samples: int):
    """Tokens with labels, of which a number that differs from sample to sample is ignored."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(VOCABULARY, (samples, LENGTH), generator=generator)
    y = torch.randint(CLASSES, (samples, LENGTH), generator=generator)
    kept = torch.randint(1, LENGTH + 1, (samples, 1), generator=generator)
    return x, torch.where(torch.arange(LENGTH) < kept, y, -100)


def rows(x, y) -> list[dict]:
    return [{"input_ids": a, "labels": b, "index": i} for i, (a, b) in enumerate(zip(x, y, strict=True))]


def by_hand(model, tap: str, x, y, batch: int, *, schedule=lambda fraction: 1.0):
    """The training on whole batches, written down without anything of ours but the ramp: (losses, final state)."""
    samples = len(x)
    history, scale = torch.zeros(samples, CLASSES), nn.Parameter(torch.ones(CLASSES))
    groups = [{"params": [*model.parameters()]}, {"params": [scale], "lr": RATE / 10}]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)
    rates = [RATE, RATE / 10]
    seen = {}
    model.get_submodule(tap).register_forward_hook(lambda module, inputs, output: seen.update(hidden=output))
    total, step, losses = EPOCHS * -(-samples // batch), 0, []
    for _ in range(EPOCHS):
        for index in torch.arange(samples).split(batch):
            output = model(x[index])
            logits = output if isinstance(output, torch.Tensor) else output.logits
            labels = masked(y[index], index)
            loss = F.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1), ignore_index=-100)
            p = logits.softmax(-1)
            p = p.mean(1) if p.ndim == 3 else p
            history[index] = 0.5 * history[index] + 0.5 * p.detach()
            ramp = 0.2 + 0.8 * step / total
            loss = loss + ramp * (p * scale - history[index]).square().sum(1).mean() + penalty(model)
            loss = loss + 0.5 * seen["hidden"].square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*model.parameters(), scale], CLIP)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step / total)
            optimizer.step()
            losses.append(loss.item())
            step += 1
    return losses, {**model.state_dict(), "scale": scale.detach(), "history": history}


def ours(model, named, batches, accumulate: int, folder: Path, *, schedule=1.0):
    """Our own loop: (records of the terms, one a step; trainer)."""
    trainer = Trainer(
        model,
        terms=named,
        optimizer=partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM),
        schedule=schedule,
        accumulate=accumulate,
        clip_norm=CLIP,
        compute=Compute(device="cpu"),
        logging=Logging(every=1, trackers=["jsonl"], folder=folder, progress_bar=False),
    )
    trainer.fit(batches, epochs=EPOCHS)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in trainer.objective.names if name in line} for line in lines[1:]], trainer


def state(model, objective) -> dict[str, torch.Tensor]:
    everything = {f"model.{k}": v for k, v in model.state_dict().items()}
    everything |= {f"terms.{k}": v for k, v in objective.terms.state_dict().items()}
    return {k: v.detach().clone() for k, v in everything.items()}


def huggingface(folder: Path, data, batch: int, accumulate: int, model=None, named=None, **settings):
    """A TermsTrainer with the settings of the other loops."""
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from regularized.training.huggingface import TermsTrainer

    given = {name: settings.pop(name) for name in ("eval_dataset", "optimizers", "callbacks") if name in settings}
    defaults = {
        "num_train_epochs": EPOCHS,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    optimizer = (torch.optim.SGD, {"lr": RATE, "momentum": MOMENTUM})
    trainer = TermsTrainer(
        bert() if model is None else model,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            **{**defaults, **settings},
        ),
        terms=terms(len(data), "bert.embeddings") if named is None else named,
        train_dataset=data,
        optimizer_cls_and_kwargs=None if "optimizers" in given else optimizer,
        **given,
    )
    trainer.pop_callback(PrinterCallback)
    return trainer


def lightning(folder: Path, accumulate: int, *, model=None, named=None, samples: int = 22, module=None, **settings):
    """A TermsModule with the settings of the other loops, and a Lightning Trainer."""
    import pytorch_lightning as pl

    from regularized.training.lightning import TermsModule

    given = {name: settings.pop(name) for name in ("schedule", "clip_norm") if name in settings}
    module = (module or TermsModule)(
        mlp() if model is None else model,
        terms=terms(samples, "0") if named is None else named,
        optimizer=partial(torch.optim.SGD, lr=RATE, momentum=MOMENTUM),
        accumulate=accumulate,
        **{"clip_norm": CLIP, **given},
    )
    defaults = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
    }
    return module, pl.Trainer(**{**defaults, **settings})


def loader(x, y, batch: int, *, ranks: int = 1):
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from regularized.training import IndexedDataset

    data = IndexedDataset(TensorDataset(x, y))
    # Lightning's own distributed sampler would shuffle.
    return DataLoader(data, batch, sampler=DistributedSampler(data, shuffle=False) if ranks > 1 else None)


def in_processes(name: str, folder: Path, *, batch: int, accumulate: int) -> list[dict[str, torch.Tensor]]:
    """Train with an adapter in two processes with gloo: the final state of each."""
    run_launched(_train, name, folder, batch, accumulate)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def _train(name: str, out: Path, batch: int, accumulate: int) -> None:
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # by which Lightning knows that somebody else starts the processes
    if name == "huggingface":
        trainer = huggingface(out / "run", rows(*sentences(24)), batch, accumulate, ddp_backend="gloo")
        trainer.train()
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        final = state(trainer.model, trainer.objective)
    else:
        torch.distributed.init_process_group("gloo")
        strategy = "ddp_find_unused_parameters_true"
        module, trainer = lightning(
            out, accumulate, samples=24, devices=2, strategy=strategy, use_distributed_sampler=False
        )
        trainer.fit(module, loader(*vectors(24), batch, ranks=2))
        losses = trainer.callback_metrics["loss"]
        final = state(module.model, module.objective)
    save_file({**final, "losses": losses}, out / f"{os.environ['RANK']}.safetensors")
    del trainer
    leave_process_group()
