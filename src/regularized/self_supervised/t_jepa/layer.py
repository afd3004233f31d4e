"""The three networks: a transformer over the tokens of a row, the predictor, and a head for fine-tuning.

Encoder and predictor share one form, post-norm layers and a block behind them::

    y = LN(x + attention(x));   z = LN(y + W2 relu(W1 y + a1) + a2)        in each layer
    out = LN(W LN(z) + a)                                                  behind the last
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.patches import take
from regularized.mechanisms.ranges import Choice, allowed, between, count
from regularized.self_supervised.t_jepa.tokens import ColumnTokenizer, encoder_positions, predictor_positions

__all__ = ["PostNormLayer", "PostNormStack", "RowClassifier", "TabularTransformer", "TargetPredictor"]

# Shapes: B rows, S tokens of a sequence, h the width; the rest as in `tokens`.

_DROPOUT = between(0.0, 1.0, "[)", "a probability")
_ACTIVATION = Choice("relu", "gelu")


class PostNormLayer(nn.Module):
    """A transformer layer of ``torch.nn.TransformerEncoderLayer``'s arithmetic that need not compute all of its tokens.

    Args:
        dim: h.
        heads: of the attention; ``dim`` is a multiple.
        feedforward: width inside the perceptron.
        dropout: on attention weights and behind each part; default 0.
        activation: ``"relu"`` (default) or ``"gelu"``.

    Raises:
        ValueError: ``dim`` is no multiple of ``heads``.

    Examples:
        >>> layer, x = PostNormLayer(8, heads=2, feedforward=16), torch.randn(3, 5, 8)
        >>> torch.allclose(layer(x, last=2), layer(x)[:, -2:], atol=1e-6)
        True
    """

    @allowed(heads=count(1), feedforward=count(1), dropout=_DROPOUT, activation=_ACTIVATION)
    def __init__(
        self, dim: int, *, heads: int, feedforward: int, dropout: float = 0.0, activation: str = "relu"
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}; change one of them")
        self.heads = heads
        self.dropout = dropout
        self.activation = activation
        self.attention_in: nn.Linear = nn.Linear(dim, 3 * dim)
        self.attention_out: nn.Linear = nn.Linear(dim, dim)
        self.hidden: nn.Linear = nn.Linear(dim, feedforward)
        self.out: nn.Linear = nn.Linear(feedforward, dim)
        self.norm1: nn.LayerNorm = nn.LayerNorm(dim)
        self.norm2: nn.LayerNorm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Tokens (B, S, h) to tokens; only the ``last`` ones (B, last, h), which see all, where it is given."""
        query, key, value = self._heads(x)
        if last is None:
            return self._rest(x, query, key, value)
        return self._rest(x[:, -last:], query[:, :, -last:], key, value)

    def ask(self, seen: Tensor, asked: Tensor, *, final: bool = False) -> tuple[Tensor, Tensor]:
        """Several sets of tokens that see the same others: these are computed once, and see nothing of the sets.

        Args:
            seen: (B, S, h), of which each token sees all.
            asked: (K, B, T, h); a token sees its own set and ``seen``.
            final: nobody asks for ``seen`` afterwards, so it comes out as it went in.

        Returns:
            Both, in their shapes.
        """
        sets = len(asked)
        query, key, value = self._heads(seen)
        each = self._heads(asked.flatten(0, 1))
        keys, values = (
            torch.cat([one.expand(sets, *one.shape).flatten(0, 1), own], dim=2)
            for one, own in ((key, each[1]), (value, each[2]))
        )
        answers = self._rest(asked.flatten(0, 1), each[0], keys, values).view_as(asked)
        return seen if final else self._rest(seen, query, key, value), answers

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, S, h / heads) each."""
        split = self.attention_in(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return split[0], split[1], split[2]

    def _rest(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What follows queries, keys and values."""
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        x = self.norm1(x + self._drop(self.attention_out(mixed.transpose(1, 2).flatten(2))))
        inside = self.hidden(x)
        inside = torch.relu_(inside) if self.activation == "relu" else F.gelu(inside)
        out: Tensor = self.norm2(x + self._drop(self.out(self._drop(inside))))
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class PostNormStack(nn.Module):
    """Layers, and behind them normalisation, a linear layer and normalisation.

    Args:
        dim: h.
        depth: number of layers.
        heads: see :class:`PostNormLayer`.
        feedforward: see :class:`PostNormLayer`.
        dropout: see :class:`PostNormLayer`.
        activation: see :class:`PostNormLayer`.
        eps: of the two normalisations behind the layers; default 1e-5 (official).

    Raises:
        ValueError: no layer, or see :class:`PostNormLayer`.

    Examples:
        >>> PostNormStack(8, depth=2, heads=2, feedforward=16)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    @allowed(depth=count(1))
    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        heads: int,
        feedforward: int,
        dropout: float = 0.0,
        activation: str = "relu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(
            PostNormLayer(dim, heads=heads, feedforward=feedforward, dropout=dropout, activation=activation)
            for _ in range(depth)
        )
        self.norm1: nn.LayerNorm = nn.LayerNorm(dim, eps=eps)
        self.linear: nn.Linear = nn.Linear(dim, dim)
        self.norm2: nn.LayerNorm = nn.LayerNorm(dim, eps=eps)
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: normal of deviation 0.02, biases 0; queries, keys and values uniform (Xavier), as torch."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        for layer in self.layers:
            assert isinstance(layer, PostNormLayer)
            nn.init.xavier_uniform_(layer.attention_in.weight)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Tokens (B, S, h) to tokens; the ``last`` ones alone, where it is given, at less cost."""
        final = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, last if number == final else None)
        return self._behind(x)

    def ask(self, seen: Tensor, asked: Tensor) -> Tensor:
        """Sets of tokens (K, B, T, h) beside tokens (B, S, h) that are computed once, see :meth:`PostNormLayer.ask`."""
        final = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, PostNormLayer)
            seen, asked = layer.ask(seen, asked, final=number == final)
        return self._behind(asked)

    def _behind(self, x: Tensor) -> Tensor:
        x = self.norm1(self.dropout(x))
        out: Tensor = self.norm2(self.dropout(self.linear(x)))
        return out


class TabularTransformer(nn.Module):
    """The encoder: a row to one vector a token.

    Defaults are the official parser's, but for dropout: the authors' tuned runs use 0.002, which we round to 0.

    Args:
        num_features: columns that hold numbers, scaled to [0, 1].
        cardinalities: number of categories of each other column.
        dim: h, even; default 64.
        depth: layers; default 4.
        heads: default 8.
        feedforward: default 256.
        dropout: default 0.
        activation: ``"relu"`` (default, official) or ``"gelu"``.
        reg_tokens: R, tokens that belong to no column and are never hidden; default 1 (official).
        missing: learn what stands for NaN, see :class:`ColumnTokenizer`; default False.

    Attributes:
        tokenizer: the :class:`ColumnTokenizer`.
        stack: the layers.

    Raises:
        ValueError: see :class:`ColumnTokenizer` and :class:`PostNormLayer`; or ``dim`` is odd.

    Examples:
        >>> encoder = TabularTransformer([0, 1], {2: 3}, dim=8, depth=1, heads=2, feedforward=16)
        >>> x = torch.tensor([[0.1, 0.2, 2.0], [0.3, 0.4, 0.0]])
        >>> encoder(x).shape, encoder(x, torch.tensor([[0, 3], [0, 1]])).shape
        (torch.Size([2, 4, 8]), torch.Size([2, 2, 8]))
    """

    def __init__(
        self,
        num_features: Sequence[int],
        cardinalities: Mapping[int, int] | None = None,
        *,
        dim: int = 64,
        depth: int = 4,
        heads: int = 8,
        feedforward: int = 256,
        dropout: float = 0.0,
        activation: str = "relu",
        reg_tokens: int = 1,
        missing: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.tokenizer: ColumnTokenizer = ColumnTokenizer(
            num_features, cardinalities, dim=dim, reg_tokens=reg_tokens, missing=missing
        )
        self.positions: Tensor
        self.register_buffer("positions", encoder_positions(self.tokenizer.num_tokens, dim), persistent=False)
        self.stack: PostNormStack = PostNormStack(
            dim, depth=depth, heads=heads, feedforward=feedforward, dropout=dropout, activation=activation
        )

    @property
    def reg_tokens(self) -> int:
        """R."""
        return self.tokenizer.reg_tokens

    @property
    def num_columns(self) -> int:
        """D."""
        return len(self.tokenizer.columns)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Represent the tokens of rows, as they see each other.

        Args:
            x: (B, D).
            keep: (B, S) positions of the tokens that are seen, 0 ... R + D - 1; default all of them.

        Returns:
            (B, S, h), in the order of ``keep``; (B, R + D, h) without.
        """
        tokens = self.tokenizer(x) + self.positions
        out: Tensor = self.stack(tokens if keep is None else take(tokens, keep))
        return out


class TargetPredictor(nn.Module):
    """The predictor: what the averaged encoder would say at other positions, from what the encoder says at some.

    Args:
        tokens: R + D, positions that can occur.
        encoder_dim: h.
        dim: d, its own width, even; default 64 (official parser; the tuned runs go down to 16).
        depth: layers; default 2 (official parser; tuned runs up to 16).
        heads: default 4.
        feedforward: default 256.
        dropout: default 0.
        activation: ``"relu"`` (default) or ``"gelu"``.
        share_context: compute the context once for all K targets, not seeing what is asked; default False, the paper's,
            where it is computed anew beside each target. Ours: with K = 4 the predictor's cost is about halved.

    Raises:
        ValueError: ``dim`` is odd, or no multiple of ``heads``.

    Examples:
        >>> predictor = TargetPredictor(6, 8, dim=4, depth=1, heads=2, feedforward=8)
        >>> seen, context = torch.randn(3, 2, 8), torch.tensor([[0, 1]]).expand(3, 2)
        >>> predictor(seen, context, torch.tensor([[[4, 5, 2]]]).expand(2, 3, 3)).shape
        torch.Size([2, 3, 3, 8])
    """

    @allowed(tokens=count(1), encoder_dim=count(1), dim=count(1))
    def __init__(
        self,
        tokens: int,
        encoder_dim: int,
        *,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        feedforward: int = 256,
        dropout: float = 0.0,
        activation: str = "relu",
        share_context: bool = False,
    ) -> None:
        super().__init__()
        self.share_context = share_context
        self.positions: Tensor
        self.register_buffer("positions", predictor_positions(tokens, dim), persistent=False)
        self.embed: nn.Linear = nn.Linear(encoder_dim, dim)
        self.mask_token: nn.Parameter = nn.Parameter(torch.empty(dim))
        self.stack: PostNormStack = PostNormStack(
            dim, depth=depth, heads=heads, feedforward=feedforward, dropout=dropout, activation=activation
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.project: nn.Linear = nn.Linear(dim, encoder_dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for linear in (self.embed, self.project):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, seen: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predict each target of each row.

        Args:
            seen: (B, n_c, h) of the encoder.
            context: (B, n_c) positions of these.
            targets: (K, B, n_t) positions to predict at; the K predictions of a row do not see each other.

        Returns:
            (K, B, n_t, h).
        """
        sets, rows, size = targets.shape
        known = self.embed(seen) + self.positions[context]
        asked = self.mask_token + self.positions[targets]
        if self.share_context:
            answers = self.stack.ask(known, asked)
        else:
            sequence = torch.cat([known.expand(sets, -1, -1, -1), asked], dim=2).flatten(0, 1)
            answers = self.stack(sequence, last=size).view(sets, rows, size, -1)
        predicted: Tensor = self.project(self.norm(answers))
        return predicted


class RowClassifier(nn.Module):
    """An encoder with a linear layer on all tokens of a row, to be fine-tuned with labels.

    Args:
        encoder: pretrained or fresh; it is trained further.
        outputs: number of classes, or of numbers to be predicted.
        use_reg: let the layer see the R tokens that belong to no column, too; default True (official code).

    Raises:
        ValueError: no output.

    Examples:
        >>> encoder = TabularTransformer([0, 1], dim=8, depth=1, heads=2, feedforward=16)
        >>> RowClassifier(encoder, 3)(torch.rand(5, 2)).shape
        torch.Size([5, 3])
    """

    @allowed(outputs=count(1))
    def __init__(self, encoder: TabularTransformer, outputs: int, *, use_reg: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.skip: int = 0 if use_reg else encoder.reg_tokens
        tokens = encoder.reg_tokens + encoder.num_columns - self.skip
        self.head: nn.Linear = nn.Linear(tokens * encoder.dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, D) to (B, outputs)."""
        out: Tensor = self.head(self.encoder(x)[:, self.skip :].flatten(1))
        return out
