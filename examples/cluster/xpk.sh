#!/usr/bin/env bash
# XPK: two slices of v5p on a GKE cluster made by `xpk cluster create`. Not run by the project.
xpk workload create --workload=run --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --tpu-type=v5p-64 --num-slices=2 --docker-image="$IMAGE" --max-restarts=20 --restart-on-exit-codes=75,76 \
    --command="python -m deepseek_jax.train --config v2_lite_16b --workdir /shared/run --config.mesh.replica=2 --config.mesh.node=8 --config.mesh.local=4"
