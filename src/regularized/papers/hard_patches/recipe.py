"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It pretrains a vision transformer without labels; a comparison tunes whole supervised trainings of one network."
)
