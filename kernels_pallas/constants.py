"""Constants that are also needed by modules without jax."""

BLOCK = 128  # numbers that share an FP8 scale: 1 x 128 tiles, 128 x 128 blocks (report section 3.3.2)
