"""Trainings that tests start in this process and, by :func:`main`, in others: to be killed, or several at once.

python scenarios.py NAME OUT [--folder CHECKPOINTS] [--resume] [--kill-at STEP | --kill-in-save STEP] [...]
"""

import argparse
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from regularized import EarlyLearning, ProgressiveDistillation
from regularized.mechanisms.distributed import leave_process_group
from regularized.mechanisms.prediction_store import TopKStore
from regularized.training import (
    Batch,
    Checkpoints,
    Compute,
    CrossEntropy,
    EarlyStopping,
    Evaluation,
    Logging,
    NonFiniteLoss,
    Step,
    TensorData,
    Term,
    Trainer,
    cosine,
    linear,
)

SAMPLES, FEATURES, CLASSES = 30, 6, 3


class Memory(Term):
    """Keeps something for each sample, draws from a generator of its own, and has a trained parameter."""

    def __init__(self) -> None:
        super().__init__(weight=linear(0.0, 0.3))
        self.register_buffer("history", torch.zeros(SAMPLES, CLASSES))
        self.scale = nn.Parameter(torch.ones(CLASSES))
        self.noise = torch.Generator().manual_seed(5)
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def epoch_start(self, progress) -> None:
        self.epochs += 1

    def forward(self, step: Step) -> torch.Tensor:
        p = step.log_probabilities.exp()
        with torch.no_grad():
            drawn = torch.rand(p.shape, generator=self.noise)
            self.history[step.index] = 0.7 * self.history[step.index] + 0.3 * p.detach() + 0.01 * drawn
        return ((p * self.scale - self.history[step.index]) ** 2).sum()


class Decay(Term):
    """A penalty on the weights, once an optimizer step."""

    per_step = True

    def forward(self, step: Step) -> torch.Tensor:
        return 1e-3 * sum(p.square().sum() for p in step.model.parameters())


class Kill(Term):
    """Kills the process, as the machine would, after an optimizer step."""

    contributes = False

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.made = at, 0

    def after_step(self, step: Step) -> None:
        self.made += 1
        if step.progress.step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Jittered(TensorDataset):
    """Augments in the process that loads, with all three global generators."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        import numpy as np

        return x + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * np.random.rand(), y  # noqa: NPY002


class Shuffled:
    """Batches of an order that is drawn from the global generator when the iteration begins."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return -(-SAMPLES // 4)

    def __iter__(self):
        for rows in torch.randperm(SAMPLES).split(4):
            yield (*(t[rows] for t in self.tensors), rows)


class Learned(torch.utils.data.Sampler):
    """An order that depends on what the model has learned when it is asked for."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        self.model, self.x = model, x

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self):
        with torch.no_grad():
            return iter((self.x @ self.model[0].weight[0]).argsort().tolist())


def tensors(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return x, (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(-1)


def resumable(
    kind: str, folder: Path | None, *, kill_at: int = 0, every: int | None = 1, keep: int = 3, memory: bool = True
):
    """Model and trainer with everything that has state: dropout, running statistics, terms, early stopping."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, CLASSES))
    x, y = tensors()
    # Kill is always there, so that the checkpoints of all runs have the same terms.
    terms = {"task": CrossEntropy(), "memory": Memory(), "decay": Decay(), "kill": Kill(kill_at)}
    if not memory:  # it keeps what this process saw, which is not for several
        del terms["memory"]
    trainer = Trainer(
        model,
        terms=terms,
        optimizer=partial(torch.optim.AdamW, lr=0.05),
        schedule=cosine(),
        accumulate=2,
        clip_norm=1.0,
        evaluate=Evaluation(
            lambda m: {"loss": float(nn.functional.cross_entropy(m(x + torch.randn_like(x)), y))},
            early_stopping=EarlyStopping("loss", "lower", patience=3),
        ),
        checkpoints=Checkpoints(folder, every=every, keep=keep) if folder else None,
        logging=Logging(every=2, trackers=["jsonl"], folder=folder / "log") if folder else Logging(every=2),
    )
    data = {
        "tensors": lambda: TensorData(x, y, batch_size=4, seed=3),
        "loader": lambda: DataLoader(Jittered(x, y), batch_size=4, shuffle=True),
        "workers": lambda: DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, num_workers=1),
        "weighted": lambda: DataLoader(
            Jittered(x, y),
            batch_size=4,
            sampler=torch.utils.data.WeightedRandomSampler(torch.arange(1.0, SAMPLES + 1), SAMPLES),
        ),
        "learned": lambda: DataLoader(TensorDataset(x, y), batch_size=4, sampler=Learned(model, x)),
        "shuffled": lambda: Shuffled(x, y),
        "iterable": lambda: [
            (x[i : i + 4], y[i : i + 4], torch.arange(SAMPLES)[i : i + 4]) for i in range(0, SAMPLES, 4)
        ],
    }[kind]()
    return model, trainer, data


class Embed(Term):
    """A term with parameters of its own, and labels that are not all counted."""

    def __init__(self) -> None:
        super().__init__(weight=0.5)
        torch.manual_seed(1 + int(os.environ.get("RANK", 0)))  # differs on the processes: the loop must level it
        self.head = nn.Linear(8, CLASSES)
        self.unused = nn.Linear(2, 2)

    taps = ("1",)

    def attach(self, model: nn.Module) -> None:
        self.start = float(model[0].weight.norm())  # derived from initial weights, which must be the first process's

    def count(self, batch: Batch):
        return (batch.targets > 0).sum()

    def forward(self, step: Step) -> torch.Tensor:
        hidden = step.hidden("1")
        further = step.forward(step.inputs + 0.1)  # a second forward before the backward pass
        losses = nn.functional.cross_entropy(self.head(hidden), step.targets, reduction="none")
        return (losses * (step.targets > 0)).sum() + further.square().mean(-1).sum() * 0.1 * self.start


def distributed(batch_size: int, accumulate: int, samples: int, *, loader: bool = False, log: Path | None = None):
    """A training whose result must not depend on the number of processes."""
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # different initial weights: the first process's count
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    terms = {"task": CrossEntropy(ignore_index=2), "embed": Embed(), "decay": Decay()}
    trainer = Trainer(
        model,
        terms=terms,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        accumulate=accumulate,
        clip_norm=0.5,
        evaluate=lambda m: {"norm": float(sum(p.square().sum() for p in m.parameters()))},
        logging=Logging(every=3, trackers=["jsonl"], folder=log) if log else Logging(every=3),
    )
    x, y = tensors()
    x, y = x[:samples].double().float(), y[:samples]
    data = (
        DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)
        if loader
        else TensorData(x, y, batch_size=batch_size)
    )
    history = trainer.fit(data, epochs=2)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"terms.{k}": v for k, v in trainer.objective.state_dict().items()}
    return {k: v.clone() for k, v in state.items()}, history


class Spoil(Term):
    """Fine until step 3; then its value or its gradient is NaN, in the last process only."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, step: Step) -> torch.Tensor:
        here = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        if step.progress.step < 3 or not here:
            return step.logits.sum() * 0.0
        if self.what == "loss":
            return step.logits.sum() * torch.nan
        return (step.logits * 0.0).square().sum().sqrt()


def tables(batch_size: int, samples: int, *, spoil: str | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """A training with all tables of samples: its final state, and how it ended."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    top = TopKStore(SAMPLES, CLASSES, k=2, dtype=torch.float32)  # int16 classes beside them
    terms = {
        "elr": EarlyLearning(SAMPLES, CLASSES, weight=0.5),
        "dense": ProgressiveDistillation(SAMPLES, CLASSES),
        "top": ProgressiveDistillation(SAMPLES, CLASSES, store=top),
    }
    if spoil in ("loss", "gradient"):
        terms["spoil"] = Spoil(spoil)
    x, y = tensors()
    x = x[:samples].clone()
    if spoil == "data":
        x[2, 1] = torch.nan
    trainer = Trainer(model, terms=terms, optimizer=partial(torch.optim.SGD, lr=0.1))
    end = "finished"
    try:
        trainer.fit(TensorData(x, y[:samples], batch_size=batch_size), epochs=3)
    except NonFiniteLoss as error:
        end = str(error)
    return {k: v for k, v in final_state(model, trainer).items() if k != "drawn"}, end


class Refusing(nn.Module):
    """A model that does not compute nothing, as solvers of differential equations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not len(x):
            raise ValueError("the state is empty")
        return self.linear(x)


class Trouble(Term):
    """In one process, at step 2: stop it as a person would, or fail."""

    contributes = False

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__()
        self.kind, self.rank = kind, rank

    def before_step(self, step: Step) -> None:
        if int(os.environ["RANK"]) == self.rank and step.progress.step == 2:
            if self.kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise ZeroDivisionError("of one process alone")


def troubled(kind: str, samples: int, *, rank: int = 1, timeout: float | None = None) -> str:
    """How a training of two processes ended that one of them cannot go on with."""
    terms = {"task": CrossEntropy()} | ({"trouble": Trouble(kind, rank)} if kind in ("stop", "fail") else {})
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) if kind == "norm" else Refusing()
    trainer = Trainer(model, terms=terms, optimizer=partial(torch.optim.SGD, lr=0.1), compute=Compute(timeout=timeout))
    x, y = tensors()
    try:
        trainer.fit(TensorData(x[:samples], y[:samples], batch_size=5), epochs=2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def final_state(model: nn.Module, trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"terms.{k}": v for k, v in trainer.objective.state_dict().items()}
    state["drawn"] = torch.rand(3)  # the random state at the end, too
    return {k: v.clone() for k, v in state.items()}


def main(*words: object) -> None:
    """Run what the words say; without any, those of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--kill-in-save", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--trouble", choices=["stop", "fail"])
    parser.add_argument("--rank", type=int)
    arguments = parser.parse_args([str(word) for word in words] or None)
    torch.set_num_threads(1)
    if arguments.name == "distributed":
        state, _ = distributed(
            arguments.batch_size,
            arguments.accumulate,
            arguments.samples,
            loader=arguments.loader,
            log=arguments.folder,
        )
        save_file(state, arguments.out / f"{os.environ['RANK']}.safetensors")
        leave_process_group()
        return
    if arguments.name == "tables":
        state, _ = tables(arguments.batch_size, arguments.samples)
        save_file(state, arguments.out / f"{os.environ['RANK']}.safetensors")
        leave_process_group()
        return
    if arguments.name == "spoilt":
        for spoil in ("loss", "gradient", "data"):
            state, end = tables(6, SAMPLES, spoil=spoil)
            save_file(state, arguments.out / f"{spoil}-{os.environ['RANK']}.safetensors", metadata={"end": end})
        leave_process_group()
        return
    if arguments.name == "refused":
        ends = [troubled("empty", 26), troubled("norm", 28), troubled("empty", 25)]
        (arguments.out / f"{os.environ['RANK']}.txt").write_text("\n".join(ends))
        leave_process_group()
        return
    if arguments.name == "troubled":
        troubled("none", 25)  # what is imported on the way takes longer than the time that is given
        end = troubled(arguments.trouble, 25, rank=arguments.rank, timeout=4.0)
        (arguments.out / f"{os.environ['RANK']}.txt").write_text(end)
        time.sleep(60)  # whoever failed alone is still there, so that no broken connection tells of it
    if arguments.name == "resumable":
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dies = restarts == "0" and os.environ["RANK"] == str(arguments.rank)
        kill_at = arguments.kill_at if dies else 0
        model, trainer, data = resumable("tensors", arguments.folder, memory=False, kill_at=kill_at)
        data.drop_last = True  # batch normalisation wants more than one sample in each process
        trainer.fit(data, epochs=3, resume=True, max_steps=arguments.max_steps)
        about = {"restarts": restarts, "steps": str(trainer.objective.terms["kill"].made)}
        save_file(final_state(model, trainer), arguments.out / f"{os.environ['RANK']}.safetensors", metadata=about)
        del model, trainer, data
        leave_process_group()
        return
    if arguments.kill_in_save:
        from regularized.training import checkpoint

        publish = checkpoint.publish

        def die(partial: Path, final: Path, *, keep: int) -> None:
            if final.name == f"step-{arguments.kill_in_save:08d}":
                os.kill(os.getpid(), signal.SIGKILL)
            publish(partial, final, keep=keep)

        checkpoint.publish = die
    model, trainer, data = resumable(arguments.name, arguments.folder, kill_at=arguments.kill_at)
    trainer.fit(data, epochs=5, resume=True)
    save_file(final_state(model, trainer), arguments.out)


if __name__ == "__main__":
    main()
