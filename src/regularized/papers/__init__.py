"""The catalogue: a folder a paper, with its card, its experiment and its checks."""
