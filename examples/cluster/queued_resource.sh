#!/usr/bin/env bash
# Cloud TPU without Kubernetes: a queued resource of one slice of v5p (32 chips, 8 machines). Not run by the project.
# All machines must mount a common disk as /shared.
set -euo pipefail
gcloud compute tpus queued-resources create run --node-id=run --project="$PROJECT" --zone="$ZONE" \
    --accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5
until gcloud compute tpus queued-resources describe run --project="$PROJECT" --zone="$ZONE" --format='value(state.state)' \
    | grep -q ACTIVE; do sleep 60; done
on_all() { gcloud compute tpus tpu-vm ssh run --worker=all --project="$PROJECT" --zone="$ZONE" --command="$1"; }
on_all "git clone -q $REPOSITORY deepseek-jax && python3 -m venv venv && venv/bin/pip install -q './deepseek-jax[tpu]'"
on_all "venv/bin/python -m deepseek_jax.train --config v2_lite_16b --workdir /shared/run --config.mesh.node=8 --config.mesh.local=4"
