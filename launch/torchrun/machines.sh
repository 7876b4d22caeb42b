#!/bin/bash
# A training on several machines without a batch system, by torchrun, under DDP. Start it on each of them, with the same words:
#
#   HEAD=10.0.0.1 MACHINES=2 launch/torchrun/machines.sh RECIPE [key=value ...]
#   launch/torchrun/machines.sh --dry-run RECIPE           prints what would be run
#
# run.dir must be on a file system that all machines see. When a rank fails, or a machine is cut off and comes back, all ranks start again
# after the newest checkpoint.
set -euo pipefail

HEAD=${HEAD:-}                           # the address of one of the machines, on which the others find each other
PORT=${PORT:-29400}                      # a free one there
MACHINES=${MACHINES:-2}
PROCESSES=${PROCESSES:-gpu}              # on each machine. gpu: one for each GPU; or a number
MAX_RESTARTS=${MAX_RESTARTS:-3}          # how often all ranks start again when one of them fails
ID=${ID:-dkd}                            # the same on all machines; another for another training

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [ -z "$HEAD" ]; then
    if [ -z "$dry_run" ]; then
        echo "dkd: set HEAD to the address of one of the machines" >&2
        exit 2
    fi
    HEAD='<head>'
fi
# Ranks of different machines connect over the network that leads to HEAD; a machine's own name often stands for its loopback.
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [ -z "$dry_run" ] && [ "$MACHINES" -gt 1 ] && command -v ip >/dev/null; then
    address=$(getent ahostsv4 "$HEAD" | sed -n '1s/ .*//p') || true
    if [ -z "$address" ]; then
        echo "dkd: HEAD=$HEAD has no IPv4 address here" >&2
        exit 2
    fi
    interface=$(ip -o -4 addr show | awk -v address="$address" 'index($4, address "/") == 1 { print $2 }' | sed -n 1p)
    interface=${interface:-$(ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')}
    if [ -n "$interface" ] && [ "$interface" != lo ]; then export GLOO_SOCKET_IFNAME=$interface; fi
fi
command=(torchrun --nnodes "$MACHINES" --nproc_per_node "$PROCESSES" --max_restarts "$MAX_RESTARTS"
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "$ID" -m dkd train "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
