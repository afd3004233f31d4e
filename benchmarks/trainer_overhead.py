"""What the loop costs: microseconds a step of a bare loop, of bare Accelerate, and of ``Trainer``, interleaved.

    python benchmarks/trainer_overhead.py [--rounds 30] [--steps 500] [--json]

The step is as small as it gets (MLP 32-64-10, batch 32, AdamW, one thread), so that what is around it shows. All three
run the same model on the same in-memory data in a random order. A round times a block of steps of each, in turning
order; the figures are medians over the rounds, with the interquartile range, and the differences are paired within a
round. ``Trainer`` runs with its defaults (records every 50 steps, finiteness check); its ``fit`` is timed whole.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.training import Compute, CrossEntropy, Logging, TensorData, Trainer

BATCH = 32


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def indexed(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(x)).split(BATCH):
        yield x.index_select(0, rows), y.index_select(0, rows)


def bare(x: Tensor, y: Tensor) -> Callable[[], None]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run() -> None:
        for inputs, labels in indexed(x, y):
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def accelerated(x: Tensor, y: Tensor) -> Callable[[], None]:
    accelerator = Accelerator(cpu=True)
    model = mlp()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    def run() -> None:
        for inputs, labels in indexed(x, y):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

    return run


def ours(x: Tensor, y: Tensor) -> Callable[[], None]:
    trainer = Trainer(
        mlp(),
        terms={"task": CrossEntropy()},
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        compute=Compute(device="cpu"),
        logging=Logging(progress_bar=False),
    )
    data = TensorData(x, y, batch_size=BATCH)
    return lambda: (trainer.fit(data, epochs=1), None)[1]


def read_indexed(x: Tensor, y: Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in indexed(x, y):
            pass

    return run


def read_ours(x: Tensor, y: Tensor) -> Callable[[], None]:
    data = TensorData(x, y, batch_size=BATCH)

    def run() -> None:
        for _ in data.batches(0):
            pass

    return run


def measure(rounds: int, steps: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Microseconds a step of each, one number a round."""
    torch.set_num_threads(1)
    x = torch.randn(BATCH * steps, 32)
    y = torch.randint(0, 10, (len(x),))
    makers = {
        "bare loop": bare,
        "bare Accelerate": accelerated,
        "Trainer": ours,
        "data: direct indexing": read_indexed,
        "data: TensorData": read_ours,
    }
    runs = {name: make(x, y) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1, rounds):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            start = clock()
            runs[name]()
            if number >= 0:  # the first round warms up
                times[name].append((clock() - start) / steps * 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=500, help="steps in a block")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    times = measure(arguments.rounds, arguments.steps)
    for other in ("bare loop", "bare Accelerate"):
        times[f"Trainer - {other}"] = [a - b for a, b in zip(times["Trainer"], times[other])]
    rows = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    if arguments.json:
        print(json.dumps({name: {"median_us": q[1], "quartiles_us": [q[0], q[2]]} for name, q in rows.items()}))
        return
    for name, (low, middle, high) in rows.items():
        print(f"{name:28s} {middle:7.1f} us a step  ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
