"""What runs many commands: jobs, and what starts them: processes, here or on a Ray cluster."""
