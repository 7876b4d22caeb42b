#!/bin/bash
# What train.sbatch runs on each node: `accelerate launch` of a dkd command, with the signals of Slurm passed on to the ranks.
# Reads the variables that train.sbatch exports.
#
#   node.sh train|launch-check RECIPE [key=value ...]     on this node, as one of SLURM_NNODES
#   node.sh status ...                                    one process, no launcher
set -euo pipefail

if [ -n "$SETUP" ]; then
    # shellcheck source=/dev/null
    source "$SETUP"
fi
if [ -n "$VENV" ]; then
    # shellcheck source=/dev/null
    source "$VENV/bin/activate"
elif [ -n "$CONDA_ENV" ]; then
    eval "$(conda shell.bash hook)"
    conda activate "$CONDA_ENV"
fi
read -r -a prefix <<<"$CONTAINER"
if [ "$1" = status ]; then
    exec ${prefix[@]+"${prefix[@]}"} python3 -m dkd "$@"
fi

# gloo connects ranks at the address that the node's own name has, which is often the loopback. NCCL chooses among all networks. Both are told
# the one that leads to the first node: on that node itself, the one that has its address.
interface_to_first_node() {
    command -v ip >/dev/null || return 0
    local address
    address=$(getent ahostsv4 "$MASTER_ADDR" | awk 'NR == 1 { print $1 }')
    [ -n "$address" ] || return 0
    local own
    own=$(ip -o -4 addr show | awk -v address="$address" 'index($4, address "/") == 1 { print $2; exit }')
    if [ -n "$own" ]; then
        echo "$own"
    else
        ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p'
    fi
}
if [ "$SLURM_NNODES" -gt 1 ] && [ -z "$DRY_RUN" ]; then
    interface=${NETWORK_INTERFACE:-$(interface_to_first_node)}
    if [ -n "$interface" ] && [ "$interface" != lo ]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
        # Only when asked: NCCL finds InfiniBand by itself, and this name is of what it sets connections up over.
        if [ -n "$NETWORK_INTERFACE" ]; then export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK_INTERFACE}; fi
    fi
fi

command=(
    ${prefix[@]+"${prefix[@]}"} accelerate launch --config_file "$ENGINE"
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * PROCESSES_PER_NODE))"
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
)
if [ "$1" = train ]; then
    # A run that stopped when asked leaves a file that says so; a launcher would call any exit code but 0 a failure, at length.
    export DKD_STOP_EXIT_CODE=0
    command+=(--max_restarts "$MAX_RESTARTS")
    # What each rank says also goes to a file of its own.
    command+=(--tee 3 --log_dir "${RUN_DIR:-RUN}/logs/job-${SLURM_JOB_ID:-0}-start-${SLURM_RESTART_COUNT:-0}-node-$SLURM_NODEID")
fi
command+=(-m dkd "$@")
if [ -n "$DRY_RUN" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi

# Slurm's signals reach this script alone, or every process below it, as its ProctrackType goes. The launcher, and the ranks as long as they
# cannot handle it, ignore USR1, which would end them; a rank that trains takes it as the wish to stop behind a checkpoint.
trap '' USR1
"${command[@]}" &
launcher=$!
stopping=
trap 'stopping=1' USR1 TERM
below() { # all processes below one
    local child
    for child in $(pgrep -P "$1"); do
        echo "$child"
        below "$child"
    done
}
code=0
while kill -0 "$launcher" 2>/dev/null; do
    if [ -n "$stopping" ]; then
        # Again and again: a rank that has only just started does not listen yet.
        for process in $(below "$launcher"); do kill -USR1 "$process" 2>/dev/null || true; done
        sleep 2 &
        wait $! || true
    else
        wait "$launcher" || true
    fi
done
wait "$launcher" || code=$?
exit "$code"
