"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It is a way to choose epochs, decay, size and number of models together; a comparison trains one model by "
    "settings that each of its arms tunes."
)
