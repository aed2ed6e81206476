#!/usr/bin/env bash
# Two nodes of eight cards:  sbatch train/recipes/slurm.sh train.repa --recipe paper --data ... --out ...
#
# The same job again goes on where the last one stopped: --hours ends the script, saved, before SLURM does.
# (The launcher passes SLURM's signal on, but kills its processes 30 s later, in the middle of a step.)
#SBATCH --job-name=gendr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --output=gendr-%j.log
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,5p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
fi
module=$1
shift
cards=${SLURM_GPUS_ON_NODE:-8}
export MASTER_ADDR MASTER_PORT=29500
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Every process and its data workers share the node's cores: without this each takes all of them.
export OMP_NUM_THREADS=1
# Large indexes of pictures are made once and read by all nodes.
export GENDR_CACHE=${GENDR_CACHE:-$HOME/.cache/gendr}
export CARDS=$cards CONFIG=${CONFIG:-train/recipes/ddp.yaml}

# $SLURM_PROCID is each node's own number: it must be expanded there, hence the single quotes.
exec srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * CARDS))" --machine_rank "$SLURM_PROCID" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" -m "$@"' gendr "$module" --hours "${HOURS:-23.5}" "$@"
