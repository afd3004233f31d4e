"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It is for classes that come task after task; a comparison trains on all classes at once."
