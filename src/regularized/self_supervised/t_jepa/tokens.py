"""A row as tokens: learned ones that belong to no column, then one for each number, then one for each category.

    number      z_j = x_j W_j + b_j
    category    z_j = E_j[x_j] + b_j
    missing     z_j = M_j + b_j                  ours, where ``missing`` is on: the paper's tables have no gaps
    [REG]       z_r = W_r                        the same for every row

The order of the tokens is [REG], numbers, categories, whatever the order of the columns; ``columns`` tells.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.mechanisms.ranges import allowed, count

__all__ = ["ColumnTokenizer", "encoder_positions", "predictor_positions"]

# Shapes: B rows, D columns, of these n numeric and c categorical, R tokens that belong to no column, h the width.


def encoder_positions(tokens: int, dim: int) -> Tensor:
    """Fixed positions of the encoders: sine and cosine in turn, of frequencies ``100^(-2i / dim)``.

    The base is 100 and not the usual 10,000, since rows are short (official code).

    Args:
        tokens: number of positions.
        dim: width, even.

    Returns:
        (tokens, dim) float32.

    Raises:
        ValueError: ``dim`` is odd.

    Examples:
        >>> encoder_positions(2, 4).round(decimals=2).tolist()
        [[0.0, 1.0, 0.0, 1.0], [0.8399999737739563, 0.5400000214576721, 0.10000000149011612, 1.0]]
    """
    _check_even(dim)
    # In float32 and by this formula, so that tables are those of trained official weights to the last bit.
    frequencies = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(100.0) / dim))
    angles = torch.arange(tokens).float()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def predictor_positions(tokens: int, dim: int) -> Tensor:
    """Fixed positions of the predictor: first all sines, then all cosines, of frequencies ``10000^(-2i / dim)``.

    Args:
        tokens: number of positions.
        dim: width, even.

    Returns:
        (tokens, dim) float32.

    Raises:
        ValueError: ``dim`` is odd.

    Examples:
        >>> predictor_positions(2, 4).round(decimals=2).tolist()
        [[0.0, 0.0, 1.0, 1.0], [0.8399999737739563, 0.009999999776482582, 0.5400000214576721, 1.0]]
    """
    _check_even(dim)
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def _check_even(dim: int) -> None:
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even, half of it sine and half cosine; got {dim}, take {dim + dim % 2 or 2}")


class ColumnTokenizer(nn.Module):
    """Rows of numbers and category codes to tokens, without positions.

    Args:
        num_features: columns that hold numbers, scaled to [0, 1] or thereabouts.
        cardinalities: number of categories of each other column; its codes are 0 ... cardinality - 1.
        dim: h.
        reg_tokens: R; default 1 (official).
        missing: learn a vector for each column that stands for NaN in it; default False, where NaN is refused.

    Attributes:
        columns: column of the table that each token after the first R belongs to.
        weight: (R + n, h).
        embedding: (sum of the cardinalities, h), one column after the other; None without categories.
        bias: (D, h).
        absent: (D, h), of ``missing``; otherwise None.

    Raises:
        ValueError: no column, a column twice or left out, a cardinality below 1; and in a step on the CPU, a code
            outside its column's range, or NaN without ``missing``. On a GPU looking would make the host wait: there
            call :meth:`check` once for the data.

    Examples:
        >>> tokenizer = ColumnTokenizer([0, 2], {1: 3}, dim=4)
        >>> tokenizer(torch.tensor([[0.5, 2.0, 0.1]])).shape, tokenizer.columns
        (torch.Size([1, 4, 4]), (0, 2, 1))
    """

    @allowed(dim=count(1), reg_tokens=count(0))
    def __init__(
        self,
        num_features: Sequence[int],
        cardinalities: Mapping[int, int] | None = None,
        *,
        dim: int,
        reg_tokens: int = 1,
        missing: bool = False,
    ) -> None:
        super().__init__()
        self.cardinalities: dict[int, int] = dict(cardinalities or {})
        self.num_features: tuple[int, ...] = tuple(num_features)
        self.columns: tuple[int, ...] = (*self.num_features, *self.cardinalities)
        if sorted(self.columns) != list(range(len(self.columns))) or not self.columns:
            raise ValueError(
                f"every column 0 ... D - 1 must be named once, in num_features or in cardinalities; got "
                f"{list(self.num_features)} and {self.cardinalities}"
            )
        for column, categories in self.cardinalities.items():
            count(1, "categories of a column")(f"cardinalities[{column}]", categories)
        self.reg_tokens = reg_tokens
        self.missing = missing
        total = sum(self.cardinalities.values())
        self.weight: nn.Parameter = nn.Parameter(torch.empty(reg_tokens + len(self.num_features), dim))
        self.embedding: nn.Parameter | None = nn.Parameter(torch.empty(total, dim)) if total else None
        self.bias: nn.Parameter = nn.Parameter(torch.empty(len(self.columns), dim))
        self.absent: nn.Parameter | None = nn.Parameter(torch.empty(len(self.columns), dim)) if missing else None
        sizes = torch.tensor(list(self.cardinalities.values()), dtype=torch.long)
        self.sizes: Tensor
        self.offsets: Tensor
        self.order: Tensor
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("offsets", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("order", torch.tensor(self.columns), persistent=False)
        self._in_order = self.columns == tuple(range(len(self.columns)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: uniform in +-1/sqrt(h), as the official code; the table of categories normal, 0.02."""
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)
        for table in (self.embedding, self.absent):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    @property
    def num_tokens(self) -> int:
        """R + D."""
        return self.reg_tokens + len(self.columns)

    def check(self, x: Tensor) -> None:
        """Refuse rows that :meth:`forward` cannot take; waits for the device.

        Args:
            x: (B, D).

        Raises:
            ValueError: another number of columns, NaN without ``missing``, or a code outside its column's range.
        """
        if x.ndim != 2 or x.shape[1] != len(self.columns):
            raise ValueError(f"x must be (rows, {len(self.columns)} columns), got {tuple(x.shape)}")
        empty = x.isnan()
        if not self.missing and bool(empty.any()):
            column = int(empty.any(dim=0).nonzero()[0])
            raise ValueError(
                f"column {column} holds NaN in {int(empty[:, column].sum())} of {len(x)} rows; build the encoder with "
                "missing=True, or fill the gaps"
            )
        codes = x[:, self.order[len(self.num_features) :]]
        wrong = (codes < 0) | (codes >= self.sizes) | (codes != codes.floor())
        wrong &= ~codes.isnan()
        if bool(wrong.any()):
            row, number = wrong.nonzero()[0].tolist()
            column, categories = list(self.cardinalities.items())[number]
            raise ValueError(
                f"column {column} has {categories} categories, so its codes are 0 ... {categories - 1}; got "
                f"{codes[row, number].item():g} in row {row}. Correct the code, or the column's cardinality"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, D) to tokens (B, R + D, h)."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check(x)
        x = x.to(self.weight.dtype)
        if not self._in_order:
            x = x[:, self.order]
        empty = x.isnan() if self.absent is not None else None
        if empty is not None:
            x = x.masked_fill(empty, 0.0)  # what follows would give NaN gradients, also where it is not used
        n = len(self.num_features)
        scale, bias = self.weight[self.reg_tokens :], self.bias
        # W and b of a number in one operation; REG needs no arithmetic.
        numbers = torch.addcmul(bias[:n], x[:, :n, None], scale)
        parts = [numbers]
        if self.embedding is not None:
            parts.append(F.embedding(x[:, n:].long() + self.offsets, self.embedding) + bias[n:])
        if self.absent is not None and empty is not None:
            columns = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            parts = [torch.where(empty[:, :, None], self.absent + bias, columns)]
        if self.reg_tokens:
            parts.insert(0, self.weight[: self.reg_tokens].expand(len(x), -1, -1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
