"""Wrong labels found by what the network believed before it could memorise."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler

from regularized import RegularizedClassifier, find_label_issues


def test_wrong_labels_are_found():
    """Fails when the suspects are those of a network that has memorised the labels, or of the wrong order."""
    X, y = load_digits(return_X_y=True)
    X, rng = StandardScaler().fit_transform(X)[:600], np.random.default_rng(0)
    truth = y[:600]
    wrong = rng.random(600) < 0.3
    noisy = np.where(wrong, (truth + rng.integers(1, 10, 600)) % 10, truth)
    found = find_label_issues(X, noisy)
    precision, recall = (found & wrong).sum() / found.sum(), (found & wrong).sum() / wrong.sum()
    assert precision > 0.85
    assert recall > 0.85
    rows = find_label_issues(X, noisy, return_indices=True)
    assert sorted(rows) == list(np.flatnonzero(found))
    assert wrong[rows[:50]].mean() > 0.9
    with pytest.raises(ValueError, match="early_learning"):
        find_label_issues(X, noisy, classifier=RegularizedClassifier())
