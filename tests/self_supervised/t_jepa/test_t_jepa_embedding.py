"""The scikit-learn door: its own checks, pipelines, words and gaps."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from regularized.papers.t_jepa.embedding import TJEPAEmbedding
from regularized.self_supervised.t_jepa import RowClassifier

pytestmark = pytest.mark.filterwarnings("ignore:embeddings have collapsed")


def fast(**settings):
    return TJEPAEmbedding(
        **{"dim": 4, "heads": 1, "depth": 1, "epochs": 2, "num_targets": 1, "random_state": 0, **settings}
    )


# Arrays of other libraries are for scikit-learn's experimental dispatch, which an environment variable switches on.
CHECKS = [
    pair for pair in estimator_checks_generator(fast()) if not pair[1].func.__name__.startswith("check_array_api")
]


@pytest.mark.parametrize("pair", CHECKS, ids=lambda pair: pair[1].func.__name__)
def test_scikit_learns_own_checks(pair):
    """Fails where the transformer is not what scikit-learn's tools take it for."""
    estimator, check = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tables of these checks are tiny, some of their columns constant
        check(estimator)


def a_table(count=60, seed=0):
    """Numbers, words, categories, truth values, and gaps in each but the last."""
    draws = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "age": draws.normal(40, 10, count),
            "city": draws.choice(["Bern", "Rome", "Oslo"], count),
            "children": pd.array(draws.integers(0, 4, count), dtype="Int64"),
            "grade": pd.Categorical(draws.choice(["low", "high"], count)),
            "member": draws.random(count) < 0.5,
        }
    )
    for row, column in enumerate(("age", "city", "children", "grade")):
        table.loc[row, column] = None
    return table


def test_words_gaps_and_truth_values_of_a_data_frame():
    """Fails when a column is taken for the wrong kind, a gap for a category, or its order decides."""
    table = a_table()
    fitted = fast().fit(table)
    tokenizer = fitted.jepa_.encoder.tokenizer
    assert tokenizer.num_features == (0, 2)
    assert tokenizer.cardinalities == {1: 3, 3: 2, 4: 2}
    assert [list(known) for known in fitted.categories_] == [
        ["Bern", "Oslo", "Rome"],
        ["high", "low"],
        ["False", "True"],
    ]
    rows = fitted.to_tensor(table)
    assert rows.isnan().nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert 0.0 <= rows[4:, 0].min() < rows[4:, 0].max() <= 1.0
    assert fitted.transform(table).shape == (60, 5 * 4)
    assert len(fitted.get_feature_names_out()) == 20
    assert fast(output="mean").fit_transform(table).shape == (60, 4)


def test_a_category_that_was_not_there_is_a_gap():
    """Fails when an unknown word raises, or reads another column's table."""
    table = a_table()
    fitted, other, gap = fast().fit(table), table.iloc[10:11].copy(), table.iloc[10:11].copy()
    other["city"], gap["city"] = "Atlantis", None
    np.testing.assert_array_equal(fitted.transform(other), fitted.transform(gap))


def test_columns_can_be_named_or_numbered():
    """Fails when codes that look like numbers are always scaled, or names and positions differ."""
    x = np.column_stack([np.random.default_rng(0).random(40), np.arange(40) % 3, np.arange(40) % 5])
    fitted = fast(categorical=[1]).fit(x)
    assert fitted.jepa_.encoder.tokenizer.cardinalities == {1: 3}
    named = fast(categorical=["b"]).fit(pd.DataFrame(x, columns=["a", "b", "c"]))
    np.testing.assert_array_equal(fitted.transform(x), named.transform(pd.DataFrame(x, columns=["a", "b", "c"])))


def test_in_pipelines_and_searches():
    """Fails when it cannot be cloned, searched over, put beside other columns, or labels leak into it."""
    table = a_table(80)
    y = (table["age"].fillna(40) > 40).to_numpy()
    pipeline = make_pipeline(fast(), StandardScaler(), LogisticRegression())
    search = GridSearchCV(pipeline, {"tjepaembedding__depth": [1, 2]}, cv=2).fit(table, y)
    assert search.best_params_["tjepaembedding__depth"] in (1, 2)
    beside = ColumnTransformer(
        [("learned", fast(), ["city", "grade", "children"]), ("plain", "passthrough", ["member"])]
    )
    assert beside.fit_transform(table).shape == (80, 13)
    copy = clone(fast(lr=0.01))
    np.testing.assert_array_equal(copy.fit(table, y).transform(table), clone(copy).fit(table).transform(table))


def test_a_seed_leaves_no_trace():
    """Fails when fitting moves the global random state, or two fits with one seed differ."""
    table = a_table()
    torch.manual_seed(5)
    first = fast().fit_transform(table)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    np.testing.assert_array_equal(first, fast().fit_transform(table))
    assert not np.array_equal(first, fast(random_state=1).fit_transform(table))


def test_what_was_learned_can_be_fine_tuned():
    """Fails when the encoder and the rows that it takes cannot be had."""
    table = a_table()
    fitted = fast().fit(table)
    model = RowClassifier(fitted.jepa_.encoder.float(), 2)
    assert model(fitted.to_tensor(table)).shape == (60, 2)


def test_files_hold_all_of_it(tmp_path):
    """Fails when a range, a category or a weight is not saved, or reading runs what is in the files."""
    table = a_table()
    fitted = fast().fit(table)
    again = TJEPAEmbedding.load(fitted.save(tmp_path / "embedding"))
    np.testing.assert_array_equal(again.transform(table), fitted.transform(table))
    assert list(again.get_feature_names_out()) == list(fitted.get_feature_names_out())
    assert again.report_ == fitted.report_
    numbers = fast(categorical=[1]).fit(np.column_stack([np.random.default_rng(0).random(40), np.arange(40) % 3]))
    other = TJEPAEmbedding.load(numbers.save(tmp_path / "numbers"))
    x = np.array([[0.3, 2.0], [np.nan, 7.0]])
    np.testing.assert_array_equal(other.transform(x), numbers.transform(x))
    (tmp_path / "numbers" / "embedding.json").write_text('{"class": "Other"}')
    with pytest.raises(ValueError, match="holds a Other"):
        TJEPAEmbedding.load(tmp_path / "numbers")
