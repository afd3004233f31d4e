"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It is a diagnosis, and changes no training."
