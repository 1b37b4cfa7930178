"""Checkpoints: those of a run (`manager`), written by all of its processes (`chunks`, `agreement`) and on the machines
themselves (`local`); directories that are committed atomically (`manifest`); zarr arrays, checked as they are read
(`arrays`)."""
