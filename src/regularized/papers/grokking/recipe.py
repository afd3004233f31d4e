"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It is a diagnosis on modular arithmetic, and changes no training on other data."
