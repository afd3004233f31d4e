"""Golden vectors of the authors' code against our public API.

A golden file ``<slug>.npz`` holds arrays named ``<case>/in/<name>``, ``<case>/hp/<name>`` and ``<case>/out/<name>``.
Several computations on the same inputs are cases below one that holds no output: ``a/b`` has what ``a`` has, too; and
every case has what ``shared`` has, which holds no output either.
The adapter of a paper (``papers/<slug>/conformance.py``) computes the outputs of a case through the public API; every
``out`` that the file holds is compared. A second setting of the same case may stand beside it under a tag,
``<case>/<tag>_in_<name>``: the adapter sees it as ``in/<tag>/<name>``, together with the rest of the case. What kind
of check a case is follows from the keys that it has.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Adapter", "Case", "GoldenError", "Row", "UnknownCase", "conform", "load_cases"]

Array = NDArray[Any]


class GoldenError(ValueError):
    """A golden file cannot be read; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case of a golden file.

    Args:
        name: name of the case; never decides how it is computed.
        inputs: arrays under ``in/``.
        hp: hyperparameters under ``hp/``, as arrays (0-d ones included); see :meth:`number` and :meth:`text`.
        outputs: arrays under ``out/``, what the authors' code gave.
        others: all cases of the file by name, for a case whose inputs are kept with another one.
    """

    name: str
    inputs: Mapping[str, Array] = field(default_factory=dict)
    hp: Mapping[str, Array] = field(default_factory=dict)
    outputs: Mapping[str, Array] = field(default_factory=dict)
    others: Mapping[str, "Case"] = field(default_factory=dict, repr=False, compare=False)

    def has(self, *names: str) -> bool:
        """Whether the case has all of these keys, written as ``"in/x"``, ``"hp/alpha"``, ``"out/loss"``."""
        groups = {"in": self.inputs, "hp": self.hp, "out": self.outputs}
        return all(name.split("/", 1)[1] in groups[name.split("/", 1)[0]] for name in names)

    def number(self, name: str, default: float | None = None) -> float:
        """A scalar hyperparameter as a float.

        Raises:
            KeyError: it is absent and there is no default.
        """
        if name not in self.hp:
            if default is None:
                raise KeyError(f"case {self.name} has no hp/{name}; it has {sorted(self.hp)}")
            return default
        return float(self.hp[name])

    def text(self, name: str, default: str = "") -> str:
        """A hyperparameter that is a string."""
        return str(self.hp[name]) if name in self.hp else default


class UnknownCase(LookupError):
    """No adapter understands a case: an error, not a pass."""

    def __init__(self, case: Case) -> None:
        super().__init__(
            f"no check for case {case.name} with in/{sorted(case.inputs)}, hp/{sorted(case.hp)}, "
            f"out/{sorted(case.outputs)}"
        )


class Adapter(Protocol):
    """What ``papers/<slug>/conformance.py`` offers; ``TOLERANCE`` may be replaced by ``tolerance(case, output)``."""

    TOLERANCE: float

    def compute(self, case: Case) -> Mapping[str, Array]:
        """Outputs of a case through the public API.

        Raises:
            UnknownCase: the keys of the case fit no check.
        """
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """Comparison of one output of one case.

    Args:
        slug: paper.
        case: name of the case.
        output: name of the output.
        max_abs_error: largest absolute difference; None where it could not be computed.
        max_rel_error: largest difference divided by max(1, magnitude of the expected entry).
        tolerance: bound on ``max_rel_error``.
        ok: whether shapes agree and the bound holds everywhere.
        note: why not, where it could not be computed.
    """

    slug: str
    case: str
    output: str
    max_abs_error: float | None
    max_rel_error: float | None
    tolerance: float
    ok: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON; ``note`` only where there is one."""
        row = asdict(self)
        if not self.note:
            del row["note"]
        return row


_KEY = re.compile(r"^(?P<case>.+)/(?P<group>in|hp|out)/(?P<name>.+)$")
_SHARED = "shared"
_TAGGED = re.compile(r"^(?P<case>.+)/(?P<tag>[^/]+?)_(?P<group>in|hp|out)_(?P<name>[^/]+)$")


def load_cases(path: Path) -> list[Case]:
    """Read a golden file.

    Raises:
        GoldenError: it is missing, truncated, not an archive of plain arrays, or a key has another form.
    """
    groups: dict[str, dict[str, dict[str, Array]]] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                match = _KEY.match(key) or _TAGGED.match(key)
                if match is None:
                    raise GoldenError(f"{path}: key {key!r} is not of the form CASE/in|hp|out/NAME")
                case = groups.setdefault(match["case"], {"in": {}, "hp": {}, "out": {}})
                tag = match.groupdict().get("tag")
                case[match["group"]][match["name"] if tag is None else f"{tag}/{match['name']}"] = archive[key]
    except FileNotFoundError:
        raise GoldenError(f"{path}: there is no such golden file") from None
    except GoldenError:
        raise
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds for a file that is not what it should be
        what = f"{type(error).__name__}: {error}"
        raise GoldenError(f"{path}: corrupt or truncated golden file ({what}); copy it again") from error
    if not groups:
        raise GoldenError(f"{path}: the golden file holds no case")
    cases: dict[str, Case] = {}
    for name, group in groups.items():
        above = sorted(other for other in groups if name.startswith(f"{other}/"))  # the outermost first
        if name != _SHARED and _SHARED in groups and not groups[_SHARED]["out"]:
            above.insert(0, _SHARED)
        inputs, hp = (
            {key: array for other in [*above, name] for key, array in groups[other][kind].items()}
            for kind in ("in", "hp")
        )
        others = [other for other in groups if other != name]
        serves = others if name == _SHARED else [other for other in others if other.startswith(f"{name}/")]
        if group["out"] or not serves:
            cases[name] = Case(name, inputs, hp, group["out"], cases)
    return list(cases.values())


def conform(slug: str, adapter: Any, path: Path) -> list[Row]:
    """Compare every output of every case of one golden file.

    Args:
        slug: paper, for the rows.
        adapter: the paper's conformance module, see :class:`Adapter`.
        path: the golden file.

    Returns:
        One row an output; a case that is not understood, or fails to compute, gives rows that are not ok.

    Raises:
        GoldenError: the file cannot be read.
    """
    rows: list[Row] = []
    for case in load_cases(path):
        note = ""
        computed: Mapping[str, Array] = {}
        try:
            computed = adapter.compute(case)
        except Exception as error:  # the table must show every case, whatever one of them does
            note = f"{type(error).__name__}: {error}"
        rows.extend(_row(slug, adapter, case, output, computed, note) for output in case.outputs or ("-",))
    return rows


def _row(slug: str, adapter: Any, case: Case, output: str, computed: Mapping[str, Array], note: str) -> Row:
    tolerance = math.nan
    try:
        tolerance = _tolerance(adapter, case, output)
        if output in computed:
            return _compare(slug, case, output, np.asarray(computed[output]), tolerance)
    except Exception as error:  # as above: a dtype that cannot be compared, a name that has no tolerance
        note = f"{type(error).__name__}: {error}"
    missing = "the case holds no output" if output == "-" else "the adapter computed no such output"
    return Row(slug, case.name, output, None, None, tolerance, False, note or missing)


def _tolerance(adapter: Any, case: Case, output: str) -> float:
    own = getattr(adapter, "tolerance", None)
    return float(own(case, output)) if callable(own) else float(adapter.TOLERANCE)


def _compare(slug: str, case: Case, output: str, ours: Array, tolerance: float) -> Row:
    expected = np.asarray(case.outputs[output])
    if ours.shape != expected.shape:
        note = f"shape {ours.shape}, expected {expected.shape}"
        return Row(slug, case.name, output, None, None, tolerance, False, note)
    if expected.dtype.kind not in "biufc":
        same = bool(np.array_equal(ours.astype(str), expected.astype(str)))
        return Row(slug, case.name, output, 0.0 if same else None, 0.0 if same else None, tolerance, same)
    if expected.size == 0:
        return Row(slug, case.name, output, 0.0, 0.0, tolerance, True)
    kind = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, b = ours.astype(kind), expected.astype(kind)
    # Equal infinities and nan in the same place agree; everything else that is not finite does not.
    agree = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(agree, 0.0, np.abs(a - b))
        relative = np.where(agree, 0.0, difference / np.maximum(1.0, np.abs(b)))
    worst = np.nan_to_num(relative, nan=np.inf).max()
    return Row(
        slug,
        case.name,
        output,
        float(np.nan_to_num(difference, nan=np.inf).max()),
        float(worst),
        tolerance,
        bool(worst <= tolerance),
    )
