#!/bin/bash
# Collect a Fisher on two nodes with four GPUs each. Submit it again after a time limit: it goes on where it stopped.
#SBATCH --job-name=fisher
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
set -euo pipefail

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 4))
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=4 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head_node:29500" \
    --no-python sstmerge fisher \
    --base meta-llama/Llama-3.1-8B-Instruct \
    --adapter utility=adapters/math --adapter safety=adapters/safety \
    --data data/benign.jsonl --labels sampled --reference utility \
    --structure kfac --draws 4 \
    --out fishers/benign.safetensors
