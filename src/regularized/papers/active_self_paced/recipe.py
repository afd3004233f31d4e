"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It is for a pool without labels, a person who labels, and classes that come one after the other; a labelled "
    "table has none of the three."
)
