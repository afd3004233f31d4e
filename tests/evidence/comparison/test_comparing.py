"""Whole comparisons on small data, and what every recipe must keep."""

import math
from inspect import getsource
from itertools import combinations

import pytest
import torch
from torch import nn

from regularized.evidence.comparison import Candidate, Need, Problem, Recipe, compare_problem, fit_boosted_trees
from regularized.evidence.comparison.baselines import RECIPES as BASELINES
from regularized.evidence.comparison.cost import measure_costs
from regularized.evidence.comparison.experiment import train
from regularized.evidence.comparison.matrix import entry_of
from regularized.evidence.comparison.planning import choose
from regularized.evidence.comparison.problem import save
from regularized.evidence.comparison.recipe import Setup
from regularized.evidence.comparison.snippet import snippet
from regularized.evidence.comparison.training import gathered
from regularized.evidence.contract import check_pair
from regularized.evidence.store import Store
from regularized.papers.catalogue import load_catalogue
from regularized.papers.comparison import candidates, compare, exclusive_pairs, without_recipe
from regularized.training import Batch, CrossEntropy, TensorData

ALL = candidates()
PAPERS = [entry.slug for entry in load_catalogue() if entry.implemented]
FOR_IMAGES = next(candidate.recipe.name for candidate in ALL if Need.IMAGES in candidate.recipe.needs)
PLAIN = next(candidate for candidate in ALL if candidate.recipe.name == "plain")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("REGULARIZED_HOME", str(tmp_path))
    return tmp_path


def problem(task="classification", shape=(4,), samples=160):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, *shape, generator=generator)
    score = x.flatten(1).sum(1)
    if task == "regression":
        return Problem(x, 5.0 + 3.0 * score)
    return Problem(x, (score > 0).long(), ("no", "yes"))


def tiny_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def stubborn():
    """Begins with the wrong answer, and does not leave it in an epoch."""
    network = nn.Linear(4, 2)
    with torch.no_grad():
        network.weight.copy_(10.0 * torch.tensor([[1.0] * 4, [-1.0] * 4]))
    return network


def small(data=None, **options):
    """A comparison in this process, unless another network is asked for."""
    defaults = {"family": "overfitting", "asked": ["dropout"], "trials": 1, "splits": 3, "epochs": 1}
    defaults |= {"make_model": lambda: tiny_network()}
    return compare_problem(data or problem(), ALL, **{**defaults, "progress": False, "workers": 1, **options})


def test_a_comparison_is_kept_and_goes_on():
    """Fails when runs are made twice, or more trials change those that were there."""
    with Store() as store:
        first = small(store=store)
        again = small(store=store)
        wider = small(store=store, trials=2)
    assert (first.reused, again.reused, wider.reused) == (0, 6, 6)
    assert first.plan.runs == 6
    assert again["dropout"].values == first["dropout"].values
    assert wider.plan.runs == 12


def test_runs_know_the_network_and_the_data():
    """Fails when another network, or other data, are given the runs of these."""
    other = problem()
    other.inputs[0] += 1.0
    with Store() as store:
        small(store=store)
        assert small(other, store=store).reused == 0
        assert small(store=store, make_model=lambda: nn.Sequential(nn.Linear(4, 2))).reused == 0
        assert small(store=store, make_model=lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))).reused == 0


def test_in_this_process_as_in_others(tmp_path, monkeypatch, warm_workers):
    """Fails when a network that no other process can import gives other numbers than one that it can."""
    (tmp_path / "importable_network.py").write_text(f"from torch import nn\n\n\n{getsource(tiny_network)}")
    monkeypatch.syspath_prepend(str(tmp_path))
    from importable_network import tiny_network as importable

    with Store() as store:
        here, there = small(store=store), small(store=store, make_model=importable)
    assert there.reused == 0
    assert there["dropout"].values == here["dropout"].values


def test_what_helps_is_recommended_with_its_price(monkeypatch):
    """Fails when a technique that surely helps is not recommended, or what it costs in other metrics is not told."""

    class Cheat(nn.Module):
        """Knows the answer, with too much confidence."""

        def forward(self, x):
            return 1e3 * torch.stack([-x.sum(1), x.sum(1)], 1).sign()

    cheat = Recipe("cheat", "knows", frozenset({"any"}), fit=lambda fitting: Cheat())
    monkeypatch.setattr("regularized.evidence.comparison.baselines.RECIPES", (*BASELINES, cheat))
    data = problem(samples=600)
    flip = torch.rand(600, generator=torch.Generator().manual_seed(1)) < 0.1
    data.targets[flip] = 1 - data.targets[flip]
    with Store() as store:
        result = compare_problem(
            data,
            [*ALL, Candidate(cheat, PLAIN.module_name)],
            family="overfitting",
            asked=["cheat"],
            trials=1,
            splits=5,
            epochs=1,
            make_model=lambda: stubborn(),  # in this process, which knows the recipe
            store=store,
            progress=False,
        )
    assert result.recommended == "cheat"
    assert result["cheat"].judged.effect > 5
    assert "nll" in result["cheat"].worse
    assert "worse in" in result.recommendation
    assert result.further_splits == 0


def test_nothing_helps_is_an_answer():
    """Fails when noise is recommended: the targets have nothing to do with the inputs."""
    data = Problem(torch.randn(200, 3), torch.arange(200) % 2, ("a", "b"))
    with Store() as store:
        result = small(data, store=store, asked=["dropout", "mixup"], make_model=lambda: nn.Linear(3, 2))
    assert result.recommended is None
    assert result.recommendation.startswith("Nothing here is surely better")
    told = result.to_dict()
    assert {"data", "problem", "metric", "splits", "arms", "recommendation", "further_splits", "seconds"} <= set(told)
    arm = {"name", "settings", "values", "guards", "effect", "interval", "p_value", "cost_ratio"}
    assert all(arm <= set(one) for one in told["arms"])
    assert told["recommendation"]["name"] is None


def test_budget():
    """Fails when the budget does not bound the work, or an impossible one is taken."""
    plans = []
    with Store() as store, pytest.raises(ValueError, match="more than the budget of 0 s"):
        small(store=store, budget=1e-6, on_plan=plans.append)
    assert not plans


def test_combining_adds_what_surely_helps(monkeypatch):
    """Fails when additions are not tried, are judged against plain alone, or exclusive ones are put together."""

    class Push(nn.Module):
        """Pulls the weights to the answer in some inputs."""

        per_step, contributes = True, True

        def __init__(self, columns):
            super().__init__()
            self.columns = columns

        def attach(self, model):
            self.weight = [model.weight]

        def forward(self, step):
            want = torch.zeros_like(self.weight[0])
            want[1, self.columns], want[0, self.columns] = 3.0, -3.0
            return 5.0 * (self.weight[0] - want)[:, self.columns].square().sum()

    recipes = [
        Recipe(f"push{n}", "", frozenset({"any"}), terms=lambda setup, s, c=columns: {"push": Push(c)})
        for n, columns in enumerate(([0, 1], [2, 3]))
    ]
    monkeypatch.setattr("regularized.evidence.comparison.baselines.RECIPES", (*BASELINES, *recipes))
    data = problem(samples=1200)
    with Store() as store:
        result = compare_problem(
            data,
            [*ALL, *(Candidate(recipe, PLAIN.module_name) for recipe in recipes)],
            family="overfitting",
            asked=["push0", "push1", "early_stopping"],
            trials=1,
            splits=5,
            epochs=4,
            batch_size=64,
            combine=True,
            make_model=lambda: stubborn(),
            store=store,
            progress=False,
        )
    assert result.recommended in ("push0 + push1", "push1 + push0")
    assert result[result.recommended].addition is not None
    assert result[result.recommended].addition[0] in ("push0", "push1")


def test_several_by_name_are_one_arm():
    """Fails when ``a + b`` is taken for two arms, or trains one of both alone."""
    result = small(asked=["dropout", "mixup + dropout"])
    assert [arm.name for arm in result.arms if arm.name != "plain"] in (
        ["dropout", "mixup + dropout"],
        ["mixup + dropout", "dropout"],
    )
    assert set(result["mixup + dropout"].settings["own"]) == {"mixup", "dropout"}
    assert result["mixup + dropout"].guards["nll"] != result["dropout"].guards["nll"]
    _, left = choose(problem(), ALL, tiny_network, "overfitting", ["dropout", "mixup+label_smoothing", "mixup+mixup"])
    assert "exclude each other" in left["mixup + label_smoothing"]
    assert left["mixup + mixup"] == "it names a technique twice"


def test_two_tasks_exclude_each_other():
    """Fails when one technique's loss silently replaces another's."""
    smoothing, mixup = (next(r for r in BASELINES if r.name == name) for name in ("label_smoothing", "mixup"))
    setup = Setup("classification", 10, 2, (4,), 1, 5, 0)
    with pytest.raises(ValueError, match="exclude each other"):
        gathered([smoothing, mixup], setup, {"label_smoothing": {"smoothing": 0.1}, "mixup": {"alpha": 0.2}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": 2}, "fewer than 3 splits"),
        ({"trials": 0}, "a trial at least"),
        ({"metric": "rmse"}, "does not fit classification"),
        ({"optimizer": "adam"}, '"sgd" or "adamw"'),
        ({"asked": ["nonsense"]}, "no recipe is named"),
        ({"asked": ["dropout + nonsense"]}, r"no recipe is named \['nonsense'\]"),
        ({"asked": ["boosted_trees + dropout"]}, "boosted_trees is a training of its own"),
        ({"asked": [FOR_IMAGES]}, "it needs square images"),
        ({"make_model": lambda: nn.Linear(3, 2)}, "does not take inputs of shape"),
        ({"make_model": lambda: nn.Linear(4, 5)}, r"must give \(4, 2\)"),
    ],
)
def test_bad_input(options, message):
    """Fails when what cannot be compared is started on."""
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_network_is_no_factory():
    """Fails when a network is taken that every run would train on further."""
    with pytest.raises(TypeError, match="give `lambda"):
        small(make_model=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="no family of problems"):
        compare(None, (torch.zeros(200, 2), torch.arange(200) % 2), problem="weather")


# -- every recipe ----------------------------------------------------------------------------------


def test_every_implemented_paper_has_a_recipe_or_a_reason():
    """Fails when a paper is left out of comparisons without a word."""
    reasons = without_recipe()
    entering = {candidate.module_name.split(".")[-2] for candidate in ALL}
    assert set(PAPERS) == set(reasons) | (entering & set(PAPERS))
    assert all(reason.endswith(".") and len(reason) > 40 for reason in reasons.values())


def fitting_problem(recipe: Recipe) -> Problem:
    return problem(shape=(1, 8, 8) if recipe.needs & {Need.IMAGES, Need.CONVOLUTIONS} else (4,))


@pytest.mark.parametrize("candidate", ALL, ids=lambda candidate: candidate.recipe.name)
def test_a_recipe_bites_and_leaves_a_network(candidate):
    """Fails when a recipe does not train, does nothing, or leaves something that does not predict."""
    recipe = candidate.recipe
    data = fitting_problem(recipe)
    base = {"data": str(save(data)), "model": {"reference": "", "code": ""}, "optimizer": "sgd"}
    base |= {"epochs": 4, "batch_size": 32}
    inputs, targets = data.prepared(data.split(0))

    def trained(of):
        settings = entry_of((of,), 2).settings(base, 1)
        network = train({**settings, "lr": 0.05}, 0, data, inputs, targets)
        with torch.no_grad():
            return network(inputs["judge"])

    output = trained(candidate)
    assert output.shape == (len(inputs["judge"]), 2)
    assert output.isfinite().all()
    assert recipe.name == "plain" or not torch.equal(output, trained(PLAIN))


@pytest.mark.parametrize("candidate", ALL, ids=lambda candidate: candidate.recipe.name)
def test_the_snippet_of_a_recipe_runs_as_it_stands(candidate):
    """Fails when the code that a winner is taken home with does not run, or leaves no trained model."""
    recipe = candidate.recipe
    data = fitting_problem(recipe)
    base = {"model": {"reference": "", "code": ""}, "epochs": 2, "batch_size": 32, "optimizer": "sgd"}
    from regularized.evidence.comparison import default_model

    model = default_model(data.input_shape, 2)
    settings = entry_of((candidate,), 1).trials[0] | {"lr": 0.01}
    code = snippet(data, [recipe], settings, base, model=model, source="problem = given")
    assert all(str(value) in code for value in settings["own"][recipe.name].values())
    names: dict[str, object] = {"given": data}
    exec(code, names)
    trained = names["model"]
    assert trained(names["inputs"][:5]).shape == (5, 2)


@pytest.mark.parametrize("candidate", [c for c in ALL if "regression" in c.recipe.tasks], ids=lambda c: c.recipe.name)
def test_regression(candidate):
    """Fails when predictions are not in the units of the targets."""
    data = problem("regression", samples=400)
    settings = entry_of((candidate,), 1).settings(
        {"data": str(save(data)), "model": {"reference": "", "code": ""}, "epochs": 15, "batch_size": 32}, 0
    )
    from regularized.evidence.comparison.experiment import DEFAULTS, run

    measured = run({**DEFAULTS, **settings, "lr": 0.01, "weight_decay": 0.0}, 0).metrics
    assert measured["judge_r2"] > (0.3 if candidate.recipe.name != "dropout" else 0.0)
    assert measured["judge_rmse"] < 6.5
    assert math.isfinite(measured["validation_mae"])


def test_trees_know_the_classes_that_a_split_lacks():
    """Fails when a class without a training sample moves the columns of the others, or is infinitely unlikely."""
    x = torch.tensor([[0.0], [1.0]]).repeat(60, 1)
    trees = fit_boosted_trees(x, (2 * x[:, 0]).long(), 3)
    output = trees(torch.tensor([[0.0], [1.0]]))
    assert output.argmax(dim=1).tolist() == [0, 2]
    assert output[:, 1].isfinite().all()
    with pytest.raises(ValueError, match=r"need a table, .* shape \(120, 1, 1\)"):
        fit_boosted_trees(x[:, :, None], x[:, 0].long(), 2)


def test_what_knows_no_steps_is_timed_whole(monkeypatch):
    """Fails when trees on the few rows of a short training stand for trees on all, and a budget buys too much."""
    data = problem(samples=2000)
    base = {"data": str(save(data)), "model": {"reference": "", "code": ""}, "epochs": 7, "batch_size": 32}
    entries = [entry_of((c,), 1) for c in ALL if c.recipe.name in ("plain", "boosted_trees")]
    seen = set()

    def record(s, seed, problem, inputs, targets):
        seen.add((s["recipes"][0][0].split(":")[1], s["epochs"], len(inputs["train"]) == len(targets["train"]) == 1200))

    monkeypatch.setattr("regularized.evidence.comparison.cost.train", record)
    measure_costs(data, {entry.name: entry.settings(base, 0) for entry in entries})
    assert seen == {("plain", 2, False), ("boosted_trees", 7, True)}


def adds(recipe):
    """Whether a recipe's terms are added to the plain task."""
    if recipe.terms is None or recipe.name in {baseline.name for baseline in BASELINES}:
        return False
    return "task" not in terms_of(recipe)


def terms_of(recipe):
    settings = entry_of((next(c for c in ALL if c.recipe is recipe),), 1).trials[0]["own"]
    return recipe.terms(SETUP, settings[recipe.name])


SETUP = Setup("classification", 160, 2, (4,), 1, 32, 0)
ADDING = [candidate for candidate in ALL if adds(candidate.recipe)]


@pytest.mark.parametrize("pair", list(combinations(ADDING, 2)), ids=lambda p: f"{p[0].recipe.name}+{p[1].recipe.name}")
def test_terms_of_two_recipes_are_one_sum(pair):
    """Fails when two techniques together do not give the sum of their gradients, or share what they remember."""
    data = problem()
    own = entry_of(pair, 1).trials[0]["own"]
    batch = next(TensorData(data.inputs, data.targets, batch_size=32).batches(0))
    check_pair(tiny_network, lambda members: gathered([pair[i].recipe for i in members], SETUP, own), batch)


def test_pairs_that_exclude_each_other_say_so():
    """Fails when two that each take the task's place, or a training of its own, are put together without a word."""
    excluded = exclusive_pairs()
    replacing = [c.recipe.name for c in ALL if c.recipe.terms is not None and "task" in terms_of(c.recipe)]
    assert len(replacing) > 1
    for pair in combinations(replacing, 2):
        assert "each takes the place of the task" in excluded[frozenset(pair)]
    for pair in combinations((candidate.recipe.name for candidate in ADDING), 2):
        assert frozenset(pair) not in excluded
    alone = next(c.recipe.name for c in ALL if c.recipe.fit is not None)
    assert "a training of its own" in excluded[frozenset({alone, ADDING[0].recipe.name})]


class Doubles(nn.Module):
    """Looks at what others have added to the gradient: no sum."""

    contributes, per_step = True, True

    def forward(self, step):
        return 0.1 * step.model[1].weight.square().sum()

    def before_step(self, step):
        step.model[1].weight.grad.mul_(2.0)


@pytest.mark.parametrize(
    ("second", "message"),
    [(lambda shared: {"b": Doubles()}, "is not the sum"), (lambda shared: {"b": shared}, "in the same memory")],
)
def test_the_check_of_pairs_sees_the_fault(second, message):
    """Fails when the check passes a technique that touches another's gradient, or another's memory."""
    table = nn.BatchNorm1d(2)  # any module with memory

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, step):
            return step.logits.square().sum()

    def terms(members):
        own = [{"a": Remembers()}, second(Remembers())]
        return {"task": CrossEntropy(), **{k: v for i in members for k, v in own[i].items()}}

    with pytest.raises(AssertionError, match=message):
        check_pair(tiny_network, terms, Batch(torch.randn(8, 4), torch.arange(8) % 2))
