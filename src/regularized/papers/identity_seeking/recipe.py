"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It learns from two frames of one video, without labels; a comparison trains on single rows that have labels."
)
