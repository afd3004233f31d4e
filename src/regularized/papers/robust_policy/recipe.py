"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It learns by playing in a simulator; a comparison trains on a table or on images that are given."
