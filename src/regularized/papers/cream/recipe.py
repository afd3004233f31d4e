"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It trains a language model on answers that the model writes itself; a comparison trains a classifier."
