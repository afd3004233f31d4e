"""A step of ``Trainer`` as it is and compiled: milliseconds of processor time, and what compiling costs once.

    python benchmarks/compiled_step.py [--models MLP ConvNet] [--techniques ...] [--rounds 7] [--steps 40] [--json]

Plain training, ridge with a schedule, and three techniques, each on an MLP (784-256-256-10, batch 64) and on a small
convolutional network (one channel, 28 x 28 pixels, batch 32), with SGD and momentum, on one thread, on data drawn at
random. A round times one ``fit`` of so many steps of each trainer, in turning order; the figures are medians over the
rounds, with the interquartile range. ``fit`` is timed whole, with its first step, which is computed without compiling.
*Compiling* is the first ``fit`` less a later one, with an empty cache of kernels: processor time of this process, and
of the C++ compiler that it waits for.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import nn

from regularized.evidence.models import mlp, small_convnet
from regularized.noisy_labels.early_learning import EarlyLearning
from regularized.overfitting.ps_kd import ProgressiveDistillation
from regularized.overfitting.weight_compander import WeightCompander
from regularized.training import Compute, CrossEntropy, Logging, Ridge, TensorData, Trainer, linear

CLASSES = 10
MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP": (lambda: mlp([784, 256, 256, CLASSES]), (784,), 64),
    "ConvNet": (lambda: small_convnet(CLASSES), (1, 28, 28), 32),
}
TECHNIQUES: Mapping[str, Callable[[int], dict[str, nn.Module]]] = {
    "plain": lambda _: {"task": CrossEntropy()},
    "ridge": lambda _: {"task": CrossEntropy(), "ridge": Ridge(weight=linear(1e-4, 1e-3))},
    "early_learning": lambda n: {
        "task": CrossEntropy(),
        "early_learning": EarlyLearning(num_samples=n, num_classes=CLASSES),
    },
    "ps_kd": lambda n: {"task": ProgressiveDistillation(num_samples=n, num_classes=CLASSES)},
    "weight_compander": lambda _: {"task": CrossEntropy(), "compander": WeightCompander()},
}


def processor_time() -> float:
    """Seconds of this process and of the compilers that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def build(model: Callable[[], nn.Module], terms: dict[str, nn.Module], compiled: bool) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        model(),
        terms=terms,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        compute=Compute(device="cpu", compile="inductor" if compiled else "no"),
        logging=Logging(progress_bar=False),
    )


def measure(model: str, technique: str, rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds a step of both kinds, one number a round; and the seconds that compiling took."""
    make, shape, batch = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    samples = batch * steps
    x = torch.randn(samples, *shape, generator=generator)
    y = torch.randint(0, CLASSES, (samples,), generator=generator)
    data = TensorData(x, y, batch_size=batch)
    trainers = {name: build(make, TECHNIQUES[technique](samples), name == "compiled") for name in ("plain", "compiled")}

    def fit(name: str) -> float:
        start = processor_time()
        trainers[name].fit(data, epochs=1)
        return processor_time() - start

    first = fit("compiled")
    fit("plain")
    times: dict[str, list[float]] = {"plain": [], "compiled": []}
    for number in range(rounds):
        for name in list(times) if number % 2 else list(times)[::-1]:
            times[name].append(fit(name) / steps * 1e3)
    times["compiling"] = [first - statistics.median(times["compiled"]) * steps / 1e3]
    return times


def table(
    models: list[str], techniques: list[str], rounds: int, steps: int, *, told: bool
) -> Iterator[dict[str, object]]:
    torch.compile(torch.sin)(torch.ones(3))  # what the compiler loads and makes once is no technique's
    for model in models:
        for technique in techniques:
            times = measure(model, technique, rounds, steps)
            plain, compiled = (statistics.quantiles(times[name], n=4) for name in ("plain", "compiled"))
            (compiling,) = times["compiling"]
            if told:
                ms = [f"{q[1]:6.2f} ms ({q[0]:.2f} to {q[2]:.2f})" for q in (plain, compiled)]
                ratio = f"plain / compiled {plain[1] / compiled[1]:.2f}"
                print(f"{model:8s} {technique:23s} {ms[0]}  {ms[1]}  {ratio}  compiling {compiling:.1f} s", flush=True)
            yield {
                "model": model,
                "technique": technique,
                "plain_ms": plain,
                "compiled_ms": compiled,
                "compiling_s": compiling,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--techniques", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a fit")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, which then knows how long it took
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        rows = list(
            table(arguments.models, arguments.techniques, arguments.rounds, arguments.steps, told=not arguments.json)
        )
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
