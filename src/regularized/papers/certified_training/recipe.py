"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It buys a proof against bounded noise with clean accuracy, as its ledger measures; a comparison asks what makes "
    "predictions better."
)
