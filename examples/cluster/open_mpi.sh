#!/usr/bin/env bash
# Open MPI 4, one process for each GPU, on machines that share WORKDIR:
#   CONFIG=v2_lite_16b WORKDIR=/shared/run ARGS="--config.mesh.local=16" HOSTS=a:8,b:8 examples/cluster/open_mpi.sh

for (( restart = 0; restart <= ${RESTARTS:-20}; restart++ )); do
    mpirun --host "$HOSTS" --tag-output -x PATH -x PYTHONPATH \
        python -m deepseek_jax.train --config "$CONFIG" --workdir "$WORKDIR" $ARGS
    code=$?
    # 76, or a signal's 128 and more: a process was lost. 75: somebody stopped the run, and starts it again.
    [[ $code == 76 || $code -gt 128 ]] || exit $code
done
exit $code
