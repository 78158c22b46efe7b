#!/bin/bash
# A teacher's pass as a Slurm job array: each task computes UNITS units of work on one GPU.
#
#   UNITS=631 sbatch --array 0-38 examples/slurm_array.sh --recipe deit_small_distilled \
#       --data.root IMAGENET --teacher timm:regnety_160@weights.safetensors --cache CACHE
#
# `deit-fast precompute ... --dry-run` says how many units there are: --blocks 0:N. The array needs
# N / UNITS tasks, rounded up; one too many has nothing to do. Tasks may run in any order, twice and at
# the same time. UNITS must stay the same when failed tasks are sent again: the script never reads how
# many tasks the array has, because Slurm then counts only those.
# Status 75 (a signal: preemption or time limit) requeues this task alone. Status 3 (units are in
# quarantine, the log names their images) and every other failure do not.
#
#SBATCH --job-name=deit-fast-units
#SBATCH --gpus=1
#SBATCH --cpus-per-task=16
#SBATCH --time=01:00:00
#SBATCH --signal=B:SIGTERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=deit-fast-%A-%a.log
set -u

first=$((SLURM_ARRAY_TASK_ID * ${UNITS:?set UNITS, the units of a task}))
export OMP_NUM_THREADS=1

# The shell receives the signal and hands it on; the first `wait` then ends before the process.
trap 'kill -TERM $!' TERM USR1
python -m deit_fast precompute "$@" --blocks "$first:$((first + UNITS))" &
process=$!
wait $process
status=$?
if [ $status -gt 128 ]; then
    wait $process
    status=$?
fi

if [ $status -eq 75 ]; then
    echo "units $first to $((first + UNITS - 1)) are sent again"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit 0
fi
exit $status
