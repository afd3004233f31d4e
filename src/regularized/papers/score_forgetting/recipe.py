"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It changes a generator of images; a comparison trains predictors on a table or on images that are given."
