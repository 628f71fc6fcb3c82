"""The version of the kit, in its own file, so that nothing imports the package for it."""

__version__ = "0.1.0"
