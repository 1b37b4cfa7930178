"""Training: losses, optimizer, one step, the loop around it, and the files that it writes to the work directory."""
