"""DeepSeek-V3 on 2,048 H100s or H800s: the program of `compile --layout report`, 66.6 of 80 GB a device, and a ramp.

The report's run, laid out as in its section 3.2, in FP8. Three numbers are not the report's: dispatch is recomputed in
the backward pass, no weight gradient waits for an idle tick, and the batch ramp begins at 4,096 sequences instead of
3,072, since DualPipe over 16 ranks takes 32 micro-batches of 128 sequences or more. No moving average of the weights
is kept (the report's is in the hosts' memory): `--config.train.ema_decay=0.999` takes 1.3 GB a device.

    srun python -m deepseek_jax.train --config v3_671b_h100_2048 --workdir gs://BUCKET/RUN \
        --config.data.sources="(('gs://BUCKET/corpus', 1.0),)"

The compiled program has no batch ramp, and thus no tables of its shorter schedules.

An evaluation scores one batch, the first 15,360 sequences of the held-out text, plus one batch from the middle of each
source that has none of these; the evaluation at the end of the run scores 8 batches, spread over the text. All are
scored in the pipeline's micro-batches.
"""

from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_671b


def get_config() -> ConfigDict:
    config: Any = v3_671b.get_config()
    config.fp8.enabled = True
    config.model.remat = "dispatch"
    config.mesh.update(dict(pipe=16, replica=2, node=8, local=8, dispatch_fp8=True, buffers="ragged", capacity=1.25))
    config.pipeline.update(dict(schedule="dualpipe", microbatches=120, deferred=0))
    config.train.accumulation_steps = 1
    config.train.ramp_from = 4096
    config.train.ema_decay = 0.0
    config.train.eval_batches = 1
    config.train.final_eval_batches = 8
    config.data.validation_fraction = 0.0005
    return config
