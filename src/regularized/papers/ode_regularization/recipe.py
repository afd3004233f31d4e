"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It needs a network that is a differential equation with a solver inside, and makes that cheaper; other "
    "networks have no such cost."
)
