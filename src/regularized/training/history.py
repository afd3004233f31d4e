"""What the evaluations of a run gave: a list, which a notebook shows as a table."""

from regularized.mechanisms.tables import html_table

__all__ = ["History"]


class History(list[dict[str, float]]):
    """Results of evaluations, one dictionary each, with ``epoch`` and ``step``.

    Examples:
        >>> history = History([{"epoch": 1.0, "step": 8.0, "accuracy": 0.5}])
        >>> history[-1]["accuracy"]
        0.5
        >>> history._repr_html_().count("<td>")
        3
    """

    def _repr_html_(self) -> str:
        """For notebooks."""
        names = list(dict.fromkeys(name for record in self for name in record))
        return html_table(names, ([record.get(name) for name in names] for record in self))
