"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It is an adapter of a pretrained model's weights; a comparison trains networks from scratch."
