"""An exported file and all that a server needs to run it. No torch."""
