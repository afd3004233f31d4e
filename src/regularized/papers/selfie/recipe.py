"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It pretrains the first stages of a classifier on images without labels, in a phase of its own; a comparison tunes "
    "one supervised training of a whole network."
)
