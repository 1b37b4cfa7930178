"""Checkpoints of a run (`manager`), written by all of its processes (`chunks`, `agreement`), also to local folders of
the machines (`local`); directories that are committed atomically (`manifest`); zarr arrays, verified as they are read
(`arrays`)."""
