#!/bin/bash
# Multi-node training under Slurm that survives the time limit and preemption.
#
#   sbatch --nodes 2 --gpus-per-node 8 examples/slurm.sh --recipe deit_small_distilled \
#       --data.root IMAGENET --cache CACHE --output runs/small
#
# Slurm sends SIGUSR1 two minutes before the time limit. torchrun forwards it, every rank saves after
# the same step and exits with status 75; the job is then requeued, and the same command resumes the
# run. After any other failure the job is not requeued.
# The output folder, the cache and this environment's Python must be visible on all nodes.
#
#SBATCH --job-name=deit-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=deit-fast-%j.log
set -u

ends=deit-fast-$SLURM_JOB_ID.status-75 # torchrun exits with 1 whatever status its workers exit with
rm -f "$ends"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # seconds from the signal to SIGKILL, 30 by default

# One rank: the trainer, and a marker file for this script if it exits with 75. The traps keep the
# shell alive until the trainer, which receives the same signal, has saved.
rank='trap : USR1 TERM; python -m deit_fast train "$@"; status=$?
    [ $status -eq 75 ] && touch "$ENDS"; exit $status'

ENDS=$PWD/$ends srun --kill-on-bad-exit=0 \
    torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:${MASTER_PORT:-29500}" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts 0 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --no-python bash -c "$rank" rank "$@"
status=$?

[ $status -eq 0 ] && exit 0
if [ -e "$ends" ]; then
    rm -f "$ends"
    echo "saved; job $SLURM_JOB_ID is requeued"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
