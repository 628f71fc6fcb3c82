"""Report: one HTML page of a selection, and what every model of a workspace scores on records."""
