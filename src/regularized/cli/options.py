"""Arguments and options that several commands share."""

from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer

__all__ = ["Engine", "EngineName", "Fresh", "Gpus", "Json", "MaybeSlug", "Slug", "TimeLimit", "Workers", "on_engine"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="Short name of a paper; `regularized papers` lists them.")]
MaybeSlug = Annotated[str | None, typer.Argument(metavar="[SLUG]", help="Short name of a paper; default all.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Parallel processes; default one for each core.")]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds that a run may take before it is ended; default any.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Make runs again that are stored already.")]


class EngineName(StrEnum):
    """Where runs can be made."""

    LOCAL = "local"
    RAY = "ray"
    DASK = "dask"


Engine = Annotated[
    EngineName,
    typer.Option(
        help="Where runs are made: on this machine, by Ray on the cluster of RAY_ADDRESS (extra `ray`), or by Dask on "
        "that of DASK_SCHEDULER_ADDRESS (extra `dask`)."
    ),
]
Gpus = Annotated[float, typer.Option(min=0, help="With Ray or Dask: GPUs for each run, 0.5 for two on one.")]


def on_engine(engine: EngineName, gpus: float) -> dict[str, Any]:
    """What the runner is told of where runs are made: nothing, for this machine."""
    from regularized.cli.errors import CommandError, Exit

    if engine is EngineName.LOCAL:
        if gpus:
            raise CommandError("--gpus is for --engine ray or dask; here a run takes the GPU that it finds", Exit.USAGE)
        return {}
    from regularized.evidence.engines import DaskEngine, EnginePool, RayEngine

    made = RayEngine(gpus=gpus) if engine is EngineName.RAY else DaskEngine(gpus=gpus)
    return {"pool": partial(EnginePool, made)}
