#!/bin/bash
# Under mpirun, one process a GPU; host names from a file:
#   mpirun -np 32 --hostfile hosts --map-by ppr:8:node docs/clusters/mpi.sh FIRST_HOST:12321 \
#       --config tiny_k_215m --data tinystories --out /shared/runs/tiny_k_215m --auto-resume
# FIRST_HOST is the host of rank 0, the first one in the file. Works with Open MPI, MPICH and Intel MPI.
set -euo pipefail

coordinator=$1
shift
processes=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-}}
index=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-}}
place=${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-}}
if [ -z "$processes" ] || [ -z "$index" ]; then
    echo "mpi.sh: no rank is set. Start it with mpirun." >&2
    exit 2
fi
# One GPU for each process of a host. Leave the line out where one process has all devices.
if [ -n "$place" ]; then export JAX_LOCAL_DEVICE_IDS=$place; fi

exec python -m tinyllm_jax.train "$@" \
    --distributed.coordinator "$coordinator" \
    --distributed.num_processes "$processes" \
    --distributed.process_id "$index"
