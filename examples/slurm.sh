#!/bin/bash
# Train on 4 nodes of 8 GPUs: features split over the 8 GPUs of a node, batches over the 4 nodes.
# Submit with: sbatch examples/slurm.sh RECIPE RUN_FOLDER
# The run folder must be on a file system that all nodes share. Submit again with the same folder to continue.
#SBATCH --job-name=clt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

recipe=$1
out=$2
# Rank 0 is on this node, and what the ranks meet by: it stays until rank 0 has done its stages after training.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# SLURM sends SIGTERM to torchrun 300 seconds before the time is up. (A signal to srun itself would kill the job.)
# torchrun passes it on; every rank finishes its step and writes a checkpoint. torchrun kills ranks that take longer than
# this many seconds (30 if not set). Older versions of torchrun do not know the variable (2.13 does) and always kill
# after 30 seconds; the job then resumes from the last checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280

resume=()
if compgen -G "$out/checkpoints/step_*" > /dev/null; then
  resume=(--resume)
fi

srun --kill-on-bad-exit=1 bash -c 'exec torchrun --node-rank "$SLURM_NODEID" "$@"' torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node 8 \
  --master-addr "$head" \
  --master-port 29500 \
  -m clt_plugins run "$recipe" --out "$out" "${resume[@]}" \
  --set parallel.name=tensor --set parallel.tensor=8 --set parallel.data=4
