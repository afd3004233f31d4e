"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It trades accuracy on clean inputs for accuracy under attack, and a comparison judges clean inputs; the range of "
    "the data and a radius are a user's to say."
)
