"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = (
    "It steers the fine-tuning of a pretrained vision-language model; a comparison trains networks from scratch."
)
