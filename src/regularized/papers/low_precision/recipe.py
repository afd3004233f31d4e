"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It trains in formats of fewer bits, at a loss that its ledger measures; a comparison asks what makes "
    "predictions better."
)
