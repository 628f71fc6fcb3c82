"""The kit's own files and folders: what is in them, how they are read and written. No torch."""
