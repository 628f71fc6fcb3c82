"""Train, average, select, fuse and export video-tagging ensembles that fit in one file.

Importing this package is light: a name's module, and with it torch, is imported on first use.
"""

__version__ = "0.1.0"
