"""Tokens, encoder and predictor, beside torch's own transformer and by hand."""

import pytest
import torch
from torch import nn

from regularized.self_supervised.t_jepa import (
    ColumnTokenizer,
    PostNormLayer,
    RowClassifier,
    TabularTransformer,
    TargetPredictor,
)


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


def an_encoder(columns=6, cardinalities=None, **settings):
    numbers = [c for c in range(columns) if c not in (cardinalities or {})]
    small = {"dim": 8, "depth": 2, "heads": 2, "feedforward": 12}
    return seeded(lambda: TabularTransformer(numbers, cardinalities, **{**small, **settings}).double())


def rows(count=5, columns=6, seed=0):
    return torch.rand(count, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_torchs(layer, dim, heads, feedforward, activation="relu"):
    """Torch's own layer with the weights of one of ours."""
    theirs = nn.TransformerEncoderLayer(dim, heads, feedforward, dropout=0.0, activation=activation, batch_first=True)
    names = {
        "attention_in.weight": "self_attn.in_proj_weight",
        "attention_in.bias": "self_attn.in_proj_bias",
        "attention_out": "self_attn.out_proj",
        "hidden": "linear1",
        "out": "linear2",
    }
    state = {}
    for name, value in layer.state_dict().items():
        for own, their in names.items():
            name = name.replace(own, their) if name.startswith(own) else name
        state[name] = value
    theirs.load_state_dict(state)
    return theirs.double()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_layer_is_torchs(activation):
    """Fails when norm, residual, head split or scale are in another place than in torch's layer."""
    ours = seeded(lambda: PostNormLayer(8, heads=2, feedforward=12, activation=activation)).double()
    theirs = as_torchs(ours, 8, 2, 12, activation)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_dropout_draws_only_in_training():
    """Fails when dropout is left out, or stays on in evaluation."""
    layer, x = seeded(lambda: PostNormLayer(8, heads=2, feedforward=12, dropout=0.5)), torch.randn(3, 5, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_the_encoder_sees_what_is_kept_and_nothing_else():
    """Fails when a hidden column leaks into the context, or positions are those of the short sequence."""
    encoder, x = an_encoder(reg_tokens=0), rows()
    keep = torch.tensor([[4, 1]]).expand(5, 2)
    changed = x.clone()
    changed[:, [0, 2, 3, 5]] += 1.0
    assert torch.equal(encoder(x, keep), encoder(changed, keep))
    assert not torch.equal(encoder(x, keep), encoder(x, keep - 1))
    # All columns kept, in any order, is no mask at all.
    order = torch.tensor([[3, 0, 5, 1, 2, 4]]).expand(5, 6)
    torch.testing.assert_close(encoder(x, order), encoder(x)[:, order[0]], rtol=1e-10, atol=1e-10)


def test_tokens_by_hand():
    """Fails when weights of numbers, tables of categories, biases or their order are mixed up."""
    tokenizer = seeded(lambda: ColumnTokenizer([1, 3], {2: 3, 0: 2}, dim=4, reg_tokens=2)).double()
    assert tokenizer.columns == (1, 3, 2, 0)
    x = torch.tensor([[1.0, 0.5, 2.0, 0.0], [0.0, 0.0, 0.0, -1.0]], dtype=torch.float64)
    tokens = tokenizer(x)
    w, b, e = tokenizer.weight, tokenizer.bias, tokenizer.embedding
    for i in range(2):
        assert torch.equal(tokens[i, :2], w[:2])  # of no column: the same whatever the row
        torch.testing.assert_close(tokens[i, 2], x[i, 1] * w[2] + b[0])
        torch.testing.assert_close(tokens[i, 3], x[i, 3] * w[3] + b[1])
        torch.testing.assert_close(tokens[i, 4], e[int(x[i, 2])] + b[2])
        torch.testing.assert_close(tokens[i, 5], e[3 + int(x[i, 0])] + b[3])
    assert torch.equal(tokens[1, 2], b[0])  # a number that is 0 leaves its bias


def test_what_is_missing_has_a_vector_of_its_own():
    """Fails when a gap becomes 0 or the first category, or makes gradients NaN."""
    tokenizer = seeded(lambda: ColumnTokenizer([0], {1: 3}, dim=4, reg_tokens=1, missing=True)).double()
    gap = float("nan")
    x = torch.tensor([[gap, 1.0], [0.3, gap], [0.3, 1.0]], dtype=torch.float64)
    tokens = tokenizer(x)
    torch.testing.assert_close(tokens[0, 1], tokenizer.absent[0] + tokenizer.bias[0])
    torch.testing.assert_close(tokens[1, 2], tokenizer.absent[1] + tokenizer.bias[1])
    assert torch.equal(tokens[0, 2], tokens[2, 2])
    assert torch.equal(tokens[1, 1], tokens[2, 1])
    tokens.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters())


def a_predictor(**settings):
    small = {"dim": 4, "depth": 2, "heads": 2, "feedforward": 8}
    return seeded(lambda: TargetPredictor(7, 8, **{**small, **settings}).double())


def test_targets_of_a_row_are_predicted_apart():
    """Fails when target sets see each other, or the order of the stack is not target by target."""
    seen, context = torch.randn(5, 3, 8, dtype=torch.float64), torch.tensor([[0, 2, 5]]).expand(5, 3)
    targets = torch.stack([torch.randperm(7)[:2].expand(5, 2) for _ in range(3)])
    for predictor in (a_predictor(), a_predictor(share_context=True)):
        together = predictor(seen, context, targets)
        for k in range(3):
            alone = predictor(seen, context, targets[k : k + 1])[0]
            torch.testing.assert_close(together[k], alone, rtol=1e-10, atol=1e-10)


def test_a_shared_context_is_that_of_a_mask():
    """Fails when the context that is computed once sees what is asked, or the asked does not see all of the context."""
    predictor = a_predictor(share_context=True)
    seen, context = torch.randn(5, 3, 8, dtype=torch.float64), torch.tensor([[0, 2, 5]]).expand(5, 3)
    targets = torch.tensor([[[1, 4]]]).expand(1, 5, 2)
    ours = predictor(seen, context, targets)[0]
    sequence = torch.cat(
        [
            predictor.embed(seen) + predictor.positions[context],
            predictor.mask_token + predictor.positions[targets[0]],
        ],
        dim=1,
    )
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[:3, 3:] = True
    for layer in predictor.stack.layers:
        sequence = as_torchs(layer, 4, 2, 8)(sequence, src_mask=hidden)
    behind = predictor.stack.norm2(predictor.stack.linear(predictor.stack.norm1(sequence)))
    theirs = predictor.project(predictor.norm(behind))[:, -2:]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_head_may_leave_out_what_belongs_to_no_column():
    """Fails when the head always reads all tokens, or drops a column with them."""
    encoder = an_encoder(reg_tokens=2)
    assert RowClassifier(encoder, 3).head.in_features == 8 * 8
    model = RowClassifier(encoder, 3, use_reg=False).double()
    x = rows()
    torch.testing.assert_close(model(x), model.head(encoder(x)[:, 2:].flatten(1)))
