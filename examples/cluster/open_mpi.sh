#!/usr/bin/env bash
# Open MPI 4, one process for each GPU, on machines that share WORKDIR:
#   CONFIG=v2_lite_16b WORKDIR=/shared/run ARGS="--config.mesh.local=16" HOSTS=a:8,b:8 examples/cluster/open_mpi.sh

for (( restart = 0; restart <= ${RESTARTS:-20}; restart++ )); do
    mpirun --host "$HOSTS" --tag-output -x PATH -x PYTHONPATH \
        python -m deepseek_jax.train --config "$CONFIG" --workdir "$WORKDIR" $ARGS
    code=$?
    # 76, or 128 + a signal's number: a process was lost. 75: a user stopped the run, and will start it again.
    [[ $code == 76 || $code -gt 128 ]] || exit $code
done
exit $code
