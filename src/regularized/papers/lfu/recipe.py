"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It guards the fine-tuning of a pretrained model against harmful data; a comparison trains networks from scratch."
)
