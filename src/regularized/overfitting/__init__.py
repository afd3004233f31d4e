"""My model overfits or is over-confident: techniques that close the gap between training and test."""
