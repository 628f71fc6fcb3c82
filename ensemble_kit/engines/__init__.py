"""What runs many commands: jobs, and what starts them: processes of this machine."""
