"""Training batches: closed rows with features, labels and supervision, in ready order, reproducible by a cursor."""
