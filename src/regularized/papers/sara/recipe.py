"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It changes small weights of a pretrained model; a comparison trains networks from scratch."
