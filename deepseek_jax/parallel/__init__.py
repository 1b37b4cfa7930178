"""Several devices: meshes and shardings (`mesh`, `sharding`), and the dispatch of tokens to experts (`dispatch`)."""
