"""Probabilities in files: the kit's own, challenge CSVs and NumPy files, and candidates made of them."""
