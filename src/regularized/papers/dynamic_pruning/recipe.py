"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It leaves out filters at inference, at a loss that its ledger measures; a comparison asks what makes "
    "predictions better."
)
