"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It learns from rows without labels, before there is a model to compare; put TJEPAEmbedding in front of any "
    "estimator in a scikit-learn pipeline, and compare there."
)
