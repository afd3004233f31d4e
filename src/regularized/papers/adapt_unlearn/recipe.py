"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It changes a generator that is there; a comparison trains classifiers on data that are given."
