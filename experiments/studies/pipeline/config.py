"""Which schedules, how many ranks and micro-batches, and what a stage's parts take."""

RANKS = 8
MICROBATCHES = (16, 20, 32, 48, 64, 120)
COSTS = {"no overlap gains": {"f": 1, "b": 2, "w": 1}, "a sixth is hidden": {"f": 1, "b": 2, "w": 1, "fb": 2.5}}
CONFIG = {"ranks": RANKS, "microbatches": list(MICROBATCHES), "costs": COSTS}
