#!/usr/bin/env bash
# One run on two machines with four GPUs each: sbatch docs/slurm.sh [more keys, as mode=lora seed=2]
# When its time is up it saves, stops and queues itself again, and then goes on.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120  # seconds before the end, to the processes of srun alone
set -euo pipefail
source .venv/bin/activate

run=runs/slurm_$SLURM_JOB_ID  # one folder for all processes, on a disk that all see
words=(mode=full batch_size=32 trainer.num_nodes=2 trainer.devices=4 "$@" hydra.run.dir="$run")
if [ -f "$run/config.yaml" ]; then words=(resume="$run"); fi
code=0
srun --kill-on-bad-exit=1 python src/run.py "${words[@]}" || code=$?
if [ "$code" -ge 130 ] && grep -qs '"state": "interrupted"' "$run/status.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
