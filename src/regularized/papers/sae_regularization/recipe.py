"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It needs embeddings of a language model, an autoencoder trained on them, and a judge who says which features "
    "are unintended."
)
