"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It needs token sequences in which phrases are composed with modifiers, and says which; a table or images "
    "have none."
)
