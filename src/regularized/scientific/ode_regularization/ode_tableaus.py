"""Coefficients of embedded explicit Runge-Kutta pairs, with their dense output.

Step n to n + 1 of ``u' = f(t, u)`` with step h::

    k_i = f(t + c_i h, u + h sum_j a_ij k_j),    u' = u + h sum_i b_i k_i,    error = h sum_i e_i k_i

The last row of a equals b, so that the last k of a step is the first of the next. Dense output is
``u(t + x h) = u + h sum_i k_i sum_q p_iq x^(q+1)``.

    Tsitouras, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption", 2011.
    Dormand & Prince 1980, with Shampine's interpolant of 1986.   Bogacki & Shampine 1989.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

__all__ = ["PAIRS", "EmbeddedPair"]

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class EmbeddedPair:
    """An explicit pair whose last stage is the first of the next step.

    Args:
        name: as it is asked for.
        order: order of the solution.
        a: coefficients of the stages 2, 3, ...; the last row is the solution.
        c: nodes of the same stages.
        error: solution less embedded solution, one coefficient a stage.
        dense: coefficients of x, x^2, ... for each stage.
        stability_size: extent of the stability region along the negative axis, to scale stiffness estimates; None
            where the last two stages are not at the same time, so that there is no estimate.
        solution: weights of the solution where it is not the last stage.
    """

    name: str
    order: int
    a: tuple[Row, ...]
    c: Row
    error: Row
    dense: tuple[Row, ...]
    stability_size: float | None
    solution: Row | None = None

    @property
    def evaluations(self) -> int:
        """New evaluations of f in a step."""
        return len(self.a)


_TSIT5 = EmbeddedPair(
    name="tsit5",
    order=5,
    a=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    c=(0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    error=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    ),
    dense=(
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.13169999999999998, -0.2234, 0.1017),
        (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
        (0.0, 1.5, -4.0, 2.5),
    ),
    stability_size=3.5068,
)

# The main branch of torchdiffeq (657943a) goes on from the embedded solution, b + error, yet takes the last stage's
# derivative for the next step. Kept for comparison with it: order 4 only.
_TSIT5_TORCHDIFFEQ = replace(
    _TSIT5,
    name="tsit5_torchdiffeq",
    order=4,
    solution=tuple(b + e for b, e in zip((*_TSIT5.a[-1], 0.0), _TSIT5.error, strict=True)),
)

_DOPRI5 = EmbeddedPair(
    name="dopri5",
    order=5,
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    # With the embedded solution of Shampine's variant, as torchdiffeq has it; the classic one differs by 1/40 in b_7.
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    dense=(
        (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
    stability_size=3.3066,
)

_BOSH3 = EmbeddedPair(
    name="bosh3",
    order=3,
    a=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    c=(1 / 2, 3 / 4, 1.0),
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    dense=((1.0, -4 / 3, 5 / 9), (0.0, 1.0, -2 / 3), (0.0, 4 / 3, -8 / 9), (0.0, -1.0, 1.0)),
    stability_size=None,
)

PAIRS: Mapping[str, EmbeddedPair] = MappingProxyType(
    {pair.name: pair for pair in (_TSIT5, _DOPRI5, _BOSH3, _TSIT5_TORCHDIFFEQ)}
)
