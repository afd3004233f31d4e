"""The scikit-learn door: its own checks, pipelines, files, and wrong labels found."""

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_classification, make_regression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from torch import nn

from regularized import RegularizedClassifier, RegularizedRegressor
from regularized.evidence.comparison import Need
from regularized.papers.comparison import candidates

RECIPES = [candidate.recipe for candidate in candidates()]
FOR_IMAGES = next(recipe.name for recipe in RECIPES if Need.IMAGES in recipe.needs)


# Checks that ask what was learnt; what else an estimator must do, it does after two epochs as well.
LEARN = {"check_classifiers_train", "check_regressors_train"}


def scikit_learns_own():
    """Pairs of an estimator and a check."""
    for kind in (RegularizedClassifier, RegularizedRegressor):
        for estimator, check in estimator_checks_generator(kind(random_state=0, epochs=2)):
            name = check.func.__name__
            # Arrays of other libraries are for scikit-learn's experimental dispatch, which a variable switches on.
            if not name.startswith("check_array_api"):
                given = kind(random_state=0) if name in LEARN else estimator
                yield pytest.param(given, check, id=f"{kind.__name__}-{name}")


@pytest.mark.parametrize(("estimator", "check"), scikit_learns_own())
def test_scikit_learns_own_checks(estimator, check):
    """Fails where the estimators are not what scikit-learn's tools take them for."""
    check(estimator)


def data(samples=120):
    X, y = make_classification(samples, 6, n_informative=4, n_classes=3, random_state=0)
    return StandardScaler().fit_transform(X), np.array(["a", "b", "c"])[y]


def fast(technique="plain", **options):
    return RegularizedClassifier(technique, **{"epochs": 8, "lr": 0.01, "random_state": 0, **options})


def test_in_pipelines_and_searches():
    """Fails when a technique cannot be cloned, cross-validated or searched over by name."""
    X, y = data()
    pipeline = make_pipeline(StandardScaler(), fast("mixup", settings={"alpha": 0.2}))
    assert cross_val_score(pipeline, X, y, cv=2).mean() > 0.5
    search = GridSearchCV(fast(), {"technique": ["plain", "mixup"], "lr": [0.01]}, cv=2).fit(X, y)
    assert search.best_params_["technique"] in ("plain", "mixup")
    assert clone(pipeline[1]).settings == {"alpha": 0.2}


@pytest.mark.parametrize("technique", [recipe.name for recipe in RECIPES if Need.IMAGES not in recipe.needs])
def test_every_technique_learns(technique):
    """Fails when a technique has no default settings that work, or labels and outputs are out of step."""
    X, y = data(240)
    model = RegularizedClassifier(technique, epochs=20, lr=0.005, random_state=0).fit(X, y)
    assert model.score(X, y) > 0.6
    assert model.predict_proba(X).sum(axis=1) == pytest.approx(np.ones(len(X)))


def test_the_same_seed_gives_the_same_network():
    """Fails when the seed does not reach weights, order or technique, or a fit leaves torch's generator changed."""
    X, y = data()
    first, second = fast("dropout").fit(X, y), fast("dropout").fit(X, y)
    other = fast("dropout", random_state=1).fit(X, y)
    assert np.array_equal(first.predict_proba(X), second.predict_proba(X))
    assert not np.array_equal(first.predict_proba(X), other.predict_proba(X))


def test_a_network_of_ones_own():
    """Fails when the given network is not used, or a wrong one costs a traceback of torch."""
    X, y = data()
    model = fast(model=lambda features, outputs: nn.Linear(features, outputs)).fit(X, y)
    assert type(model.network_) is nn.Linear
    with pytest.raises(ValueError, match=r"must give \(2, 3\)"):
        fast(model=lambda features, outputs: nn.Linear(features, 7)).fit(X, y)


def test_files(tmp_path):
    """Fails when a saved estimator predicts otherwise, or a file is run instead of read."""
    X, y = data()
    model = fast("mixup").fit(X, y)
    again = RegularizedClassifier.load(model.save(tmp_path / "model"))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    assert list(again.classes_) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="it holds a RegularizedClassifier"):
        RegularizedRegressor.load(tmp_path / "model")
    about = json.loads((tmp_path / "model" / "estimator.json").read_text())
    (tmp_path / "model" / "estimator.json").write_text(json.dumps({**about, "n_features": 3}))
    with pytest.raises(ValueError, match="can be read"):
        RegularizedClassifier.load(tmp_path / "model")
    with pytest.raises(ValueError, match="weights alone"):
        fast("co_teaching").fit(X, y).save(tmp_path / "pair")


def test_regression_is_in_the_units_of_the_targets(tmp_path):
    """Fails when standardised predictions come out, also of a file."""
    X, y = make_regression(200, 5, noise=1.0, random_state=0)
    model = RegularizedRegressor("mixup", random_state=0).fit(X, 100.0 + y)
    assert model.score(X, 100.0 + y) > 0.8
    again = RegularizedRegressor.load(model.save(tmp_path / "model"))
    assert np.array_equal(again.predict(X), model.predict(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"technique": "magic"}, "is not known; there are"),
        ({"technique": FOR_IMAGES}, "square images"),
        ({"settings": {"strength": 1.0}}, "has no settings"),
        ({"optimizer": "adam"}, "must be one of"),
        ({"epochs": 0}, "at least 1"),
    ],
)
def test_bad_input(options, message):
    """Fails when a setting that means nothing trains silently."""
    X, y = data()
    with pytest.raises(ValueError, match=message):
        RegularizedClassifier(**options).fit(X, y)
    with pytest.raises(ValueError, match="it is for classification"):
        RegularizedRegressor("label_smoothing").fit(X, np.arange(len(X)))


def test_training_leaves_the_global_generator_alone():
    """Fails when a fit inside somebody's program changes what the program draws afterwards."""
    X, y = data()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fast().fit(X, y)
    assert torch.rand(1) == expected
