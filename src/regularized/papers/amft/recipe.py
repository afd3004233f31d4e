"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It fine-tunes a language model on demonstrations and on a reward; a comparison trains on a table or on images."
)
