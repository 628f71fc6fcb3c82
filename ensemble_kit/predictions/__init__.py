"""Probabilities in files: the kit's own, challenge CSVs, NumPy files; candidates made of them."""
