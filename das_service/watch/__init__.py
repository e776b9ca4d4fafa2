"""Who lives, what is ready, how far the rows are."""
