"""The transitions of one step of all episodes so far, in buffers that grow by doubling."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["StepLog"]


class StepLog:
    """What was seen at one step of the episodes.

    Attributes:
        features: (k, d) features of state and action.
        rewards: (k,) rewards.
        next_features: (k, A, d) features of all actions at the next state.
        next_rewards: (k, A) known rewards there that are no function of the features; zeros where there are none.
        next_reference: (k, A) the reference policy there.
        next_total: (k, A) discounted sums of action values there, which mirror steps remember.
        alive: (k,) whether the episode went on; where it ended, the next value is 0.

    Args:
        num_actions: A.
        width: d.
        dtype: of all numbers.

    Examples:
        >>> log = StepLog(num_actions=2, width=3)
        >>> log.append(features=torch.rand(5, 3), alive=torch.ones(5, dtype=torch.bool))
        >>> len(log), log.features.shape, log.next_rewards.shape
        (5, torch.Size([5, 3]), torch.Size([5, 2]))
    """

    def __init__(self, *, num_actions: int, width: int, dtype: torch.dtype = torch.float64) -> None:
        self._length: int = 0
        shapes: dict[str, tuple[int, ...]] = {
            "features": (width,),
            "rewards": (),
            "next_features": (num_actions, width),
            "next_rewards": (num_actions,),
            "next_reference": (num_actions,),
            "next_total": (num_actions,),
        }
        self._columns: dict[str, Tensor] = {name: torch.zeros(0, *shape, dtype=dtype) for name, shape in shapes.items()}
        self._columns["alive"] = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return self._length

    def append(self, **rows: Tensor) -> None:
        """Add n transitions.

        Args:
            rows: attributes with n rows each; what is left out is zero.
        """
        (count,) = {len(rows_) for rows_ in rows.values()}
        needed = self._length + count
        for name, column in self._columns.items():
            if needed > len(column):
                more = column.new_zeros(max(needed, 2 * len(column)) - len(column), *column.shape[1:])
                self._columns[name] = torch.cat([column, more])
            if name in rows:
                self._columns[name][self._length : needed] = rows[name]
        self._length = needed

    def __getattr__(self, name: str) -> Tensor:
        columns = self.__dict__.get("_columns", {})
        if name not in columns:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        column: Tensor = columns[name]
        return column[: self._length]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the columns."""
        return {name: column[: self._length].clone() for name, column in self._columns.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the columns of a :meth:`state_dict`.

        Raises:
            ValueError: another number of actions or features.
        """
        for name, column in self._columns.items():
            if state[name].shape[1:] != column.shape[1:]:
                raise ValueError(
                    f"the log's {name} has rows of shape {tuple(state[name].shape[1:])} in the state and "
                    f"{tuple(column.shape[1:])} here; build the agent with the same actions and features"
                )
        self._columns = {name: state[name].clone() for name in self._columns}
        self._length = len(state["features"])
