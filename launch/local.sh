#!/bin/bash
# A training on this machine, on all its GPUs, or on its CPUs if it has none.
#
#   launch/local.sh RECIPE [key=value ...]
#   PROCESSES=4 ENGINE=fsdp2 MAX_RESTARTS=3 launch/local.sh RECIPE
#   launch/local.sh --dry-run RECIPE                       prints what would be run
#
# MAX_RESTARTS: how often all ranks start again, after the newest checkpoint, when one of them fails.
set -euo pipefail

DKD=${DKD:-$(cd "$(dirname "$0")/.." && pwd)}          # the folder that holds launch/
gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true); fi
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -v '^-' | grep -c '[0-9]' || true); fi
if [ "$gpus" -gt 0 ]; then engine=ddp; else engine=cpu; fi
ENGINE=${ENGINE:-$engine}
PROCESSES=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
MAX_RESTARTS=${MAX_RESTARTS:-0}
# Without GPUs, ranks share the cores; with them, a few threads feed each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((gpus > 0 || $(nproc) <= PROCESSES ? 1 : $(nproc) / PROCESSES))}

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
case $ENGINE in */* | *.yaml) ;; *) ENGINE=$DKD/launch/accelerate/$ENGINE.yaml ;; esac
# Port 0: a free one, so that several trainings fit on one machine.
command=(accelerate launch --config_file "$ENGINE" --num_processes "$PROCESSES" --main_process_port 0
    --max_restarts "$MAX_RESTARTS" -m dkd train "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
