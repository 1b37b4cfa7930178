"""Many devices: what lies where (`mesh`), and how tokens reach their experts (`dispatch`)."""
