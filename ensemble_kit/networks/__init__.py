"""Models: sub-models, foreign models and ensembles, and how they come from files."""
