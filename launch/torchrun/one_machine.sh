#!/bin/bash
# A training on one machine by torchrun, under DDP (for FSDP2 and ZeRO: launch/local.sh).
#
#   launch/torchrun/one_machine.sh RECIPE [key=value ...]
#   PROCESSES=4 MAX_RESTARTS=3 launch/torchrun/one_machine.sh RECIPE
#   launch/torchrun/one_machine.sh --dry-run RECIPE        prints what would be run
set -euo pipefail

PROCESSES=${PROCESSES:-gpu}              # gpu: one for each GPU; or a number
MAX_RESTARTS=${MAX_RESTARTS:-0}          # how often all ranks start again, after the newest checkpoint, when one of them fails

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
fi
command=(torchrun --standalone --nproc_per_node "$PROCESSES" --max_restarts "$MAX_RESTARTS" -m dkd train "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
