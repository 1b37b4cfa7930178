"""Many devices: meshes and shardings (`mesh`, `sharding`), and how tokens reach their experts (`dispatch`)."""
