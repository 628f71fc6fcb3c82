"""Records on disk to batches in memory. NumPy only."""
