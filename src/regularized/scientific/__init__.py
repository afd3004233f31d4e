"""I solve inverse problems and differential equations: learned solvers and regularizers for scientific computing."""
