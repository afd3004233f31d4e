"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It gives initial weights without labels, for probes, and its card's claims are about representations; a "
    "comparison tunes whole supervised trainings."
)
