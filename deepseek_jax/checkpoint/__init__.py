"""Checkpoints: the arrays of a run (`manager`), directories that are committed atomically (`manifest`), and the zarr
arrays of converted checkpoints (`arrays`)."""
