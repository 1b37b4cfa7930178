"""What is trained in FP8 and in bfloat16, for how long, and which sums the accumulation model is asked about."""

VARIANTS = {
    "bf16": [],
    "bf16_two_micro_batches": ["--config.train.micro_batches=2"],  # the same sums in another order: the yardstick
    "fp8": ["--config.fp8.enabled=True"],
    "fp8_128x128": ["--config.fp8.enabled=True", "--config.fp8.gradient_tiles=128x128"],
    "fp8_tensor": ["--config.fp8.enabled=True", "--config.fp8.tiles=tensor"],
    "fp8_e5m2": ["--config.fp8.enabled=True", "--config.fp8.gradient_format=e5m2"],
}
STUDIED = ("bf16", "bf16_two_micro_batches", "fp8", "fp8_128x128")
# At its config's own rate (3e-3) a tiny model amplifies any rounding; the report's peak rate (section 4.2) is where its
# bound was found.
CALM = ["--config.optimizer.learning_rate=2.2e-4", "--config.optimizer.warmup=0.1"]
SETTINGS = {"tiny": ("tiny", 240, []), "small_calm": ("small", 150, CALM)}
SEEDS = (0, 1, 2)
COMMON = ["--config.train.batch_size=8", "--config.train.sequence_length=256", "--config.train.sample_tokens=0",
          "--config.train.eval_every=100000", "--config.train.checkpoint_every=60", "--config.train.checkpoints_kept=1"]
SMOOTHING = 40  # steps of the moving average
WARM_UP = 0.25  # of the run, left out of the comparison
LIMIT = 0.0025  # the report's bound on the relative difference of the loss

# Sums of K products kept to 14 bits: cut off after every `groups` of them, moved to float32 every `promoted` (0: no).
K, PROMOTED, GROUPS = 4096, (32, 64, 128, 256, 0), (32, 4)

CONFIG = {"variants": {name: VARIANTS[name] for name in STUDIED},
          "settings": {name: list(setting) for name, setting in SETTINGS.items()}, "seeds": list(SEEDS),
          "common": COMMON, "smoothing": SMOOTHING, "warm_up": WARM_UP, "limit": LIMIT,
          "accumulation": [K, list(PROMOTED), list(GROUPS)]}
