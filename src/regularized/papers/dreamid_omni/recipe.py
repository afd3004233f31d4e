"""Why it takes no part in a comparison on anybody's data."""

NO_RECIPE = "It trains a generator of video and audio; a comparison trains models that predict one target of an input."
