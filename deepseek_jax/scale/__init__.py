"""What a model costs: planning and compiling for hardware you don't have."""
