#!/usr/bin/env bash
# sbatch scripts/launch/slurm.sh --recipe coatnet_in1k --data-dir imagenet --model coatnet_1
#SBATCH --job-name=coatnet_zoo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -uo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    scripts/finetune.py "$@" --resume auto &
step=$!
preempted=
trap 'preempted=yes; kill -TERM "$step"' TERM
wait "$step"
code=$?
[ -z "$preempted" ] || { wait "$step"; code=$?; }  # the first wait ended with the signal, the second with the save
# A run that failed by itself would fail again.
if [ -n "$preempted" ] && [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
