"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It chooses the strengths of smooth, strongly convex lower problems by their exact solution, which a network "
    "has not."
)
