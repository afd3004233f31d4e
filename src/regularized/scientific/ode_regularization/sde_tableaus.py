"""Coefficients of Roessler's stochastic Runge-Kutta methods of strong order 1.5, for diagonal Ito noise.

Roessler, "Runge-Kutta methods for the strong approximation of solutions of stochastic differential equations",
SIAM J. Numer. Anal. 48, 2010.  The two sets, optimised for stability: Rackauckas & Nie, "Stability-optimized high
order methods and stiffness detection for pathwise stiff stochastic differential equations", 2020; numbers as in
StochasticDiffEq.jl (MIT).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["STOCHASTIC", "StochasticTableau"]

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StochasticTableau:
    """Four stages, each with one call of the drift (at H0) and one of the diffusion (at H1).

    Args:
        name: as it is asked for.
        a0: drift in the states H0 of the drift, rows of the stages 2, 3, 4.
        b0: diffusion in H0.
        a1: drift in the states H1 of the diffusion.
        b1: diffusion in H1.
        c0: nodes of the drift.
        c1: nodes of the diffusion.
        alpha: weights of the drift.
        beta1: weights of the diffusion with dW.
        beta2: with chi1.
        beta3: with chi2.
        beta4: with chi3.
        stability_size: scale of the stiffness estimate; None where the last two stages are at different times.
    """

    name: str
    a0: tuple[Row, ...]
    b0: tuple[Row, ...]
    a1: tuple[Row, ...]
    b1: tuple[Row, ...]
    c0: Row
    c1: Row
    alpha: Row
    beta1: Row
    beta2: Row
    beta3: Row
    beta4: Row
    stability_size: float | None


_SOSRI = StochasticTableau(
    name="sosri",
    a0=(
        (-0.04199224421316468,),
        (2.842612915017106, -2.0527723684000727),
        (4.338237071435815, -2.8895936137439793, 2.3017575594644466),
    ),
    b0=(
        (-0.21641093549612528,),
        (1.5336352863679572, 0.26066223492647056),
        (-1.0536037558179159, 1.7015284721089472, -0.20725685784180017),
    ),
    a1=(
        (0.26204282091330466,),
        (0.20903646383505375, -0.1502377115150361),
        (0.05836595312746999, 0.6149440396332373, 0.08535117634046772),
    ),
    b1=(
        (-0.5119011827621657,),
        (2.67767339866713, -4.9395031322250995),
        (0.15580956238299215, 3.2361551006624674, -1.4223118283355949),
    ),
    c0=(0.0, -0.04199224421316468, 0.7898405466170333, 3.7504010171562823),
    c1=(0.0, 0.26204282091330466, 0.05879875232001766, 0.758661169101175),
    alpha=(1.140099274172029, -0.6401334255743456, 0.4736296532772559, 0.026404498125060714),
    beta1=(-1.8453464565104432, 2.688764531100726, -0.2523866501071323, 0.40896857551684956),
    beta2=(0.4969658141589478, -0.5771202869753592, -0.12919702470322217, 0.2093514975196336),
    beta3=(2.8453464565104425, -2.688764531100725, 0.2523866501071322, -0.40896857551684945),
    beta4=(0.11522663875443433, -0.57877086147738, 0.2857851028163886, 0.17775911990655704),
    stability_size=None,
)

_SOSRI2 = StochasticTableau(
    name="sosri2",
    a0=(
        (0.13804532298278663,),
        (0.5818361298250374, 0.4181638701749618),
        (0.4670018408674211, 0.8046204792187386, -0.27162232008616016),
    ),
    b0=(
        (0.08852381537667678,),
        (1.0317752458971061, 0.4563552922077882),
        (1.73078280444124, -0.46089678470929774, -0.9637509618944188),
    ),
    a1=(
        (0.45605532163856893,),
        (0.7555807846451692, 0.24441921535482677),
        (0.6981181143266059, 0.3453277086024727, -0.04344582292908241),
    ),
    b1=(
        (0.6753186815412179,),
        (-0.07452812525785148, -0.49783736486149366),
        (-0.5591906709928903, 0.022696571806569924, -0.8984927888368557),
    ),
    c0=(0.0, 0.13804532298278663, 0.9999999999999992, 0.9999999999999994),
    c1=(0.0, 0.45605532163856893, 0.999999999999996, 0.9999999999999962),
    alpha=(-0.15036858140642623, 0.7545275856696072, 0.686995463807979, -0.2911544680711602),
    beta1=(-0.45315689727309133, 0.8330937231303951, 0.3792843195533544, 0.24077885458934192),
    beta2=(-0.4994383733810986, 0.9181786186154077, -0.25613778661003145, -0.16260245862427797),
    beta3=(1.4531568972730915, -0.8330937231303933, -0.3792843195533583, -0.24077885458934023),
    beta4=(-0.4976090683622265, 0.9148155835648892, -1.4102107084476505, 0.9930041932449877),
    stability_size=10.6,
)

STOCHASTIC: Mapping[str, StochasticTableau] = MappingProxyType({table.name: table for table in (_SOSRI, _SOSRI2)})
