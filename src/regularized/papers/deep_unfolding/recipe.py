"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It replaces an iterative solver of a known linear inverse problem; it trains no network on inputs and "
    "targets of its own."
)
