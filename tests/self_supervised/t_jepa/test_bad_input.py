"""Bad inputs of T-JEPA: each is answered by what was given, what is allowed, and how to mend it."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from tests.bad_input import assert_refused, refused

from regularized.papers.t_jepa.contract import a_training, an_encoder, rows
from regularized.papers.t_jepa.embedding import TJEPAEmbedding
from regularized.self_supervised.t_jepa import (
    TJEPA,
    CollapseWarning,
    ColumnTokenizer,
    MaskSizes,
    TabularTransformer,
    TargetPredictor,
    average_momentum,
    collapse_report,
    draw_masks,
    prediction_loss,
    warmup_cosine,
)
from regularized.training.data import TensorData

NAN = float("nan")


def small(**settings):
    return TabularTransformer(range(6), **{"dim": 8, "depth": 1, "heads": 2, "feedforward": 16, **settings})


def a_jepa(**settings):
    encoder = settings.pop("encoder", None) or small()
    predictor = settings.pop("predictor", None) or TargetPredictor(7, 8, dim=4, heads=2, feedforward=8)
    return TJEPA(encoder, predictor, **{"total_steps": 4, **settings})


def coded(*values):
    return ColumnTokenizer([0], {1: 3}, dim=4)(torch.tensor([list(values)]))


def too_often():
    training = a_training(total_steps=1)
    for _ in range(2):
        training.jepa.after_step()


def collapsed():
    training = a_training()
    with torch.no_grad():
        for weight in training.jepa.target.module.tokenizer.parameters():
            weight.zero_()
    training.optimizers.steps = [3]
    training.report(rows(20))


def without_reg():
    TJEPA(small(reg_tokens=0), TargetPredictor(6, 8, dim=4, heads=2, feedforward=8), total_steps=4)


def fast(**settings):
    return TJEPAEmbedding(**{"dim": 4, "heads": 1, "depth": 1, "epochs": 1, "random_state": 0, **settings})


def numbers(**changed):
    x = np.random.default_rng(0).random((20, 4))
    for column, value in changed.items():
        x[:, int(column[1:])] = value
    return x


def other_state():
    training = a_training()
    state = training.state_dict()
    state["jepa"] = {}
    training.load_state_dict(state)


def bad_inputs():
    return [
        # Tables too narrow for the shares: the official loop would spin for ever.
        refused(
            "share rounds to 0",
            partial(MaskSizes.of_shares, 3),
            ValueError,
            ("context=(0.136, 0.368)", "0 to 1", "5 col"),
        ),
        refused("no range", partial(MaskSizes.of_shares, 4), ValueError, ("1 to 1", "change context", "5 columns")),
        refused(
            "no range of targets",
            partial(MaskSizes.of_shares, 6, (0.2, 0.5), (0.3, 0.33)),
            ValueError,
            ("target=(0.3, 0.33) of 6 columns is 2 to 2", "change target"),
        ),
        refused(
            "never fits",
            partial(MaskSizes.of_shares, 10, (0.6, 0.7), (0.5, 0.8)),
            ValueError,
            ("6 of 10 columns", "5", "context[0]=0.6", "target[0]=0.5"),
        ),
        refused("share above 1", partial(MaskSizes.of_shares, 10, (0.2, 1.2)), ValueError, ("(0.2, 1.2)", "[0, 1]")),
        refused("shares swapped", partial(MaskSizes.of_shares, 10, (0.4, 0.2)), ValueError, ("smaller one first",)),
        refused("sizes swapped", partial(MaskSizes, 10, 3, 2, 1, 1), ValueError, ("min_context", "3 and 2")),
        refused("sizes that do not fit", partial(MaskSizes, 4, 3, 3, 2, 2), ValueError, ("need 5", "has 4")),
        refused("one column", partial(MaskSizes.any_table, 1), ValueError, ("2 are needed", "n_features = 1")),
        refused(
            "masks that do not fit",
            partial(draw_masks, 2, 4, (3, 2), num_targets=1, generator=torch.Generator()),
            ValueError,
            ("fit into 4 tokens", "3 and 2"),
        ),
        refused(
            "no target",
            partial(draw_masks, 2, 4, (1, 2), num_targets=0, generator=torch.Generator()),
            ValueError,
            ("num_targets", "0"),
        ),
        # Rows
        refused("NaN", partial(coded, NAN, 1.0), ValueError, ("column 0 holds NaN", "missing=True")),
        refused("code out of range", partial(coded, 0.5, 3.0), ValueError, ("column 1", "3 categories", "got 3")),
        refused("negative code", partial(coded, 0.5, -1.0), ValueError, ("0 ... 2", "got -1")),
        refused("half a code", partial(coded, 0.5, 0.5), ValueError, ("got 0.5",)),
        refused("other columns", partial(coded, 0.5), ValueError, ("2 columns", "(1, 1)")),
        refused("embed NaN", lambda: a_jepa().embed(torch.full((2, 6), NAN)), ValueError, ("column 0",)),
        # Networks
        refused("odd width", partial(small, dim=9, heads=3), ValueError, ("dim must be even", "9", "10")),
        refused("heads", partial(small, heads=3), ValueError, ("dim=8", "heads=3")),
        refused("odd predictor", partial(TargetPredictor, 7, 8, dim=5), ValueError, ("even", "5", "6")),
        refused("predictor's heads", partial(TargetPredictor, 7, 8, dim=6), ValueError, ("dim=6", "heads=4")),
        refused("no layer", partial(small, depth=0), ValueError, ("depth", "0")),
        refused("dropout of 1", partial(small, dropout=1.0), ValueError, ("dropout", "[0, 1)")),
        refused("activation", partial(small, activation="tanh"), ValueError, ("'relu' or 'gelu'", "tanh")),
        refused("column twice", partial(ColumnTokenizer, [0, 1], {1: 3}, dim=4), ValueError, ("named once", "{1: 3}")),
        refused("column left out", partial(ColumnTokenizer, [0, 2], dim=4), ValueError, ("named once", "[0, 2]")),
        refused("no column", partial(ColumnTokenizer, [], dim=4), ValueError, ("named once",)),
        refused("no category", partial(ColumnTokenizer, [0], {1: 0}, dim=4), ValueError, ("cardinalities[1]", "0")),
        refused("no token", without_reg, CollapseWarning, ("reg_tokens=0", "collapse_report")),
        # Pretraining
        refused(
            "predictor of another table",
            partial(a_jepa, predictor=TargetPredictor(9, 8, dim=4, heads=2)),
            ValueError,
            ("9 tokens", "TargetPredictor(7, 8"),
        ),
        refused(
            "sizes of another table",
            partial(a_jepa, sizes=MaskSizes.of_shares(9)),
            ValueError,
            ("9 columns", "encoder has 6"),
        ),
        refused("momentum", partial(a_jepa, momentum=(0.9, 1.1)), ValueError, ("momentum[1]", "1.1")),
        refused("clip", partial(a_jepa, clip=0.0), ValueError, ("clip", "0.0")),
        refused("mode", partial(a_jepa, reg_mode="released"), ValueError, ("'paper' or 'official'",)),
        refused("too many steps", too_often, UserWarning, ("total_steps=1", "more often")),
        refused(
            "too many epochs",
            lambda: a_training(total_steps=3).fit(TensorData(rows(32), batch_size=8), epochs=1),
            UserWarning,
            ("4 steps", "total_steps=3"),
        ),
        refused("rate", lambda: warmup_cosine(1, warmup=-1, total=4, peak=1.0), ValueError, ("warmup", "-1")),
        refused("no update", lambda: average_momentum(0, total=0), ValueError, ("total", "0")),
        refused("other state", other_state, ValueError, ("jepa does not fit", "missing")),
        refused(
            "loss of two shapes",
            lambda: prediction_loss(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)),
            ValueError,
            ("(1, 2, 3, 4)", "(1, 2, 3, 5)"),
        ),
        # Collapse
        refused("collapse", collapsed, CollapseWarning, ("variance over rows", "0.001", "reg_tokens=1")),
        refused("one row", partial(collapse_report, torch.ones(1, 4)), ValueError, ("2 rows", "(1, 4)")),
        refused("NaN embedding", partial(collapse_report, torch.full((3, 4), NAN)), ValueError, ("finite",)),
        # The transformer
        refused("constant column", lambda: fast().fit(numbers(c2=7.0)), UserWarning, ("['2'] are constant",)),
        refused("all gaps", lambda: fast().fit(numbers(c1=NAN)), UserWarning, ("['1'] are constant",)),
        refused(
            "one column of a table", lambda: fast().fit(numbers()[:, :1]), ValueError, ("1 feature", "minimum of 2")
        ),
        refused("one row of it", lambda: fast().fit(numbers()[:1]), ValueError, ("minimum of 2",)),
        refused(
            "unknown column", lambda: fast(categorical=["city"]).fit(numbers()), ValueError, ("['city']", "0 to 3")
        ),
        refused("categorical word", lambda: fast(categorical="all").fit(numbers()), ValueError, ("'auto'", "'all'")),
        refused("output", lambda: fast(output="reg").fit(numbers()), ValueError, ("'columns' or 'mean'", "'reg'")),
        refused("epochs", lambda: fast(epochs=0).fit(numbers()), ValueError, ("at least 1", "0")),
        refused("infinite", lambda: fast().fit(numbers(c0=np.inf)), ValueError, ("infinity",)),
    ]


@pytest.mark.parametrize(("call", "error", "says"), bad_inputs())
def test_bad_input(call, error, says):
    """Fails when it is accepted, or refused in words that do not help."""
    with warnings.catch_warnings():
        if not issubclass(error, Warning):
            warnings.simplefilter("ignore", CollapseWarning)
        assert_refused(call, error, says)


def test_a_code_of_another_column_is_never_read():
    """Fails when a code outside its range reads the table of the next column instead of being refused."""
    encoder = an_encoder()
    x = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 3.0, 0.0]])
    with pytest.raises(ValueError, match="column 5 has 3 categories"):
        encoder(x)
