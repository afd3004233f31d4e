"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It needs inputs that exist in training and not in use; a comparison's data have one set of inputs for both."
)
