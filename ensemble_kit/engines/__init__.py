"""What runs many commands: processes of this machine."""
