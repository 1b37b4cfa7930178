"""Training: losses, optimizer, one step, the loop around it, and what it leaves in the work directory."""
