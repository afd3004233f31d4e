"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It is for inputs of which channels may be missing; a comparison trains and judges on complete inputs, with a "
    "network that is not a vision transformer."
)
