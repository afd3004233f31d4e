"""``import regularized``: names that are not there, and what may have been meant."""

import pytest

import regularized


def test_a_mistyped_import_says_what_was_meant():
    """Fails when a letter that is missing costs a search through the documentation."""
    with pytest.raises(ImportError, match=r"cannot import name 'CrossEntrpy' .* Did you mean CrossEntropy"):
        from regularized import CrossEntrpy  # noqa: F401
    with pytest.raises(ImportError, match="Did you mean EarlyLearningLoss"):
        from regularized import EarlyLearninLoss  # noqa: F401
    with pytest.raises(AttributeError, match="Did you mean Trainer"):
        regularized.Trainr  # noqa: B018


def test_names_that_are_like_none():
    """Fails when anything is suggested for everything, or asking whether a name is there raises."""
    with pytest.raises(ImportError, match="cannot import name 'Xylophone'") as error:
        from regularized import Xylophone  # noqa: F401
    assert "Did you mean" not in str(error.value)
    assert not hasattr(regularized, "CrossEntrpy")
    assert getattr(regularized, "CrossEntrpy", None) is None
    from regularized import training  # a folder is no mistake

    assert training is regularized.training
