#!/bin/bash
# What train.sbatch runs on each node: `accelerate launch` of a dkd command, with the signals of Slurm passed on to the ranks.
# Reads the variables that train.sbatch exports.
#
#   node.sh train|launch-check RECIPE [key=value ...]     on this node, as one of SLURM_NNODES
#   node.sh status ...                                    one process, no launcher
stopping=
trap 'stopping=1' USR1 TERM
# What the environment's own scripts print is not what this script is asked for.
exec 3>&1 1>&2

# They are not written for `set -eu`.
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
set -euo pipefail

read -r -a prefix <<<"$CONTAINER"
if [ "$1" = status ]; then
    exec ${prefix[@]+"${prefix[@]}"} python3 -m dkd "$@" 1>&3
fi
exec 1>&3

# gloo connects ranks at the address that the node's own name has, which is often the loopback. NCCL chooses among all networks. gloo is told
# the interface that leads from here to the first node, or from there to the last.
interface_to_the_others() {
    command -v ip >/dev/null || return 0
    local other=$MASTER_ADDR address
    if [ "$SLURM_NODEID" -eq 0 ]; then other=$LAST_NODE; fi
    address=$(getent ahostsv4 "$other" | sed -n '1s/ .*//p') || return 0
    ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' || return 0
}
if [ "$SLURM_NNODES" -gt 1 ] && [ -z "$DRY_RUN" ]; then
    interface=${NETWORK_INTERFACE:-$(interface_to_the_others)}
    if [ -n "$interface" ] && [ "$interface" != lo ]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    fi
    # Only when asked: NCCL finds InfiniBand by itself, and this name is of what it sets connections up over.
    if [ -n "$NETWORK_INTERFACE" ]; then export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK_INTERFACE}; fi
fi

command=(
    accelerate launch --config_file "$ENGINE"
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * PROCESSES_PER_NODE))"
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
)
if [ "$1" = train ]; then
    # A run that stopped when asked leaves a file that says so, whatever code the user's environment asks for; a launcher would call any
    # exit code but 0 a failure, at length.
    export DKD_STOP_EXIT_CODE=0
    command+=(--max_restarts "$MAX_RESTARTS")
    # What each rank says also goes to a file of its own.
    command+=(--tee 3 --log_dir "${RUN_DIR:-RUN}/logs/job-${SLURM_JOB_ID:-0}-start-${SLURM_RESTART_COUNT:-0}-node-$SLURM_NODEID")
fi
command+=(-m dkd "$@")
if [ -n "$DRY_RUN" ]; then
    printf '%q ' ${prefix[@]+"${prefix[@]}"} "${command[@]}"
    echo
    exit
fi

# A container may start without the variables of the job (apptainer's --cleanenv does): those that dkd and this script read go along as words.
kept=()
for name in SLURM_JOB_ID SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_CLUSTER_NAME SLURM_RESTART_COUNT SLURM_NODEID \
    DKD_LAUNCH_ID DKD_STOP_EXIT_CODE; do
    if [ -n "${!name:-}" ]; then kept+=("$name=${!name}"); fi
done
# Slurm's signals reach this script alone, or every process below it, as its ProctrackType goes. The launcher, which USR1 would end, ignores it,
# inside a container too; a rank takes it as the wish to stop after a checkpoint.
trap '' USR1
# shellcheck disable=SC2016
${prefix[@]+"${prefix[@]}"} bash -c 'trap "" USR1; exec "$@"' bash env ${kept[@]+"${kept[@]}"} "${command[@]}" &
launcher=$!
trap 'stopping=1' USR1 TERM
is_rank() { # of this job, on this node
    local variables
    variables=$(tr '\0' '\n' 2>/dev/null <"/proc/$1/environ") || return 1
    [[ $'\n'$variables$'\n' == *$'\n'"SLURM_JOB_ID=$SLURM_JOB_ID"$'\n'* ]] || return 1
    [[ $'\n'$variables$'\n' == *$'\n'"SLURM_NODEID=$SLURM_NODEID"$'\n'* ]] || return 1
    [[ $'\n'$variables == *$'\n'LOCAL_RANK=* ]]
}
tell_ranks() {
    local folder parent
    for folder in /proc/[0-9]*; do
        is_rank "${folder#/proc/}" || continue
        # What a rank itself has started, such as its image loaders, does not train.
        parent=$(sed -n 's/^PPid:[^0-9]*//p' "$folder/status" 2>/dev/null) || continue
        if ! is_rank "$parent"; then kill -USR1 "${folder#/proc/}" 2>/dev/null || true; fi
    done
}
code=0
while kill -0 "$launcher" 2>/dev/null; do
    if [ -n "$stopping" ]; then
        # Again and again: a rank that has only just started does not listen yet.
        tell_ranks
        sleep 2 &
        wait $! || true
    else
        wait "$launcher" || true
    fi
done
wait "$launcher" || code=$?
exit "$code"
