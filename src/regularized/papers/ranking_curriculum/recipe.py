"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It needs queries with ranked candidates and a first-stage score of each; a table or images have none."
