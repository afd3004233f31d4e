"""SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining: card."""
