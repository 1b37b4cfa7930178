"""Pictures of a run, drawn from what it wrote down."""
