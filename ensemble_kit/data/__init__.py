"""Records on disk to batches in memory. NumPy only; imports ``errors`` and ``files``."""
