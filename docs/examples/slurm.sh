#!/bin/bash
# SimCLR on a cluster with SLURM:
#     sbatch --nodes 2 docs/examples/slurm.sh photos.tar /shared/runs/photos
# Before its time is over, or when it is preempted, the job saves a checkpoint and queues itself
# again.
#SBATCH --job-name=simclr
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
data=$1 out=$2
shift 2

# The images go to the disk of every node, once per node; the run's folder is on a shared disk.
local=${SLURM_TMPDIR:-/tmp}/simclr-$SLURM_JOB_ID
# shellcheck disable=SC2016 # each node expands it
srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
  sh -c 'mkdir -p "$2" && cp -r --update "$1" "$2"' sh "$data" "$local" || exit 1

# One task per GPU. Each gets cores of its own. If one fails, the others end within a minute.
srun --cpu-bind=cores simclr-fast pretrain --data "$local/$(basename "$data")" --out "$out" --resume "$@"
status=$?
# 138 = 128 + SIGUSR1: a checkpoint was saved. The next start may have another number of nodes.
if [ "$status" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
