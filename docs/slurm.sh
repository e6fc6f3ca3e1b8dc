#!/usr/bin/env bash
# One run on two machines with four GPUs each; a requeued job goes on: sbatch docs/slurm.sh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120  # seconds before the end: the run saves and stops
set -euo pipefail
source .venv/bin/activate

run=runs/slurm_$SLURM_JOB_ID  # one folder for all processes, on a disk that all see
words=(mode=full batch_size=32 trainer.num_nodes=2 trainer.devices=4 hydra.run.dir="$run")
if [ -f "$run/config.yaml" ]; then words=(resume="$run"); fi
srun --kill-on-bad-exit=1 python src/run.py "${words[@]}"
