"""Recipes: what is in their TOML, and how they are found, read and checked."""
