#!/usr/bin/env bash
# Starts N processes of swe_prune on this machine, which do one run together.
#
#   launch/local.sh N [OPTION...] -- run --config=FILE --workdir=DIR [...]
#
#   --devices=K      each process sees K CPU devices (without it: what JAX finds)
#   --port=P         where process 0 listens (without it: a free one)
#   --grace=SECONDS  how long the others may go on when one has failed, or process 0 has
#                    finished, before they are killed (120)
#   --sweep          N independent runs instead, which share the cells of a sweep
#   --dry-run        print the commands and run nothing
#
# Process 0 writes to this terminal as if it ran alone; lines of the others go to stderr with their
# number in front. SIGTERM, SIGINT and SIGHUP are passed on to all. The exit code is that of the first
# process, in the order of their numbers, that did not end with 0. LAUNCH_PYTHON is the interpreter.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "devices= port= grace= sweep" "$@"
words 1
count=${WORDS[0]:-}
[[ -n $count ]] || die "the number of processes is missing; give it first, for example 2"
whole "the number of processes" "$count" 1
grace=${OPTION[grace]:-120}
whole "--grace" "$grace" 0
check_training
! has_shard || die "'--shard' makes independent runs; use --sweep, which gives each its own"

environment=()
if [[ -n ${OPTION[devices]:-} ]]; then
    whole "--devices" "${OPTION[devices]}" 1
    flag=--xla_force_host_platform_device_count=${OPTION[devices]}
    environment=(env JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$flag")
fi

# Below the range from which systems take the ports of outgoing connections.
free_port() {
    local port
    while true; do
        port=$((20000 + RANDOM % 12000))
        if ! (exec 4<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
}

port=${OPTION[port]:-$(free_port)}
whole "--port" "$port" 1
((port < 65536)) || die "--port=$port is above 65535; take a smaller one"

# LINE becomes the command of one process.
line_of() {
    LINE=("${environment[@]}" "$PYTHON" -m swe_prune "${TRAIN[@]}")
    if [[ -n ${OPTION[sweep]:-} ]]; then
        LINE+=("--shard=$1/$count")
    else
        LINE+=("--coordinator=127.0.0.1:$port" "--process=$1/$count")
    fi
}

if dry; then
    for ((index = 0; index < count; index++)); do
        line_of "$index"
        perform "${LINE[@]}"
    done
    exit 0
fi
have "$PYTHON" "activate the virtual environment or set LAUNCH_PYTHON"

# Process groups of their own: a Ctrl-C in the terminal then reaches the processes once, through
# this script, and not as an ignored signal, which is what a script's background jobs are born with.
set -m
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkfifo "$scratch/tick"
exec {tick}<>"$scratch/tick"

pids=()
readers=()
codes=()
caught=

forward() {
    local index
    caught=$1
    for index in "${!pids[@]}"; do
        [[ -n ${codes[index]:-} ]] || kill -s "$1" "${pids[index]}" 2>/dev/null || true
    done
}
for name in TERM INT HUP; do
    # shellcheck disable=SC2064  # the name of now is meant
    trap "forward $name" "$name"
done

prefixed() {
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        printf '[process %s] %s\n' "$1" "$line" >&2
    done
}

for ((index = 0; index < count; index++)); do
    line_of "$index"
    if ((index == 0)); then
        "${LINE[@]}" </dev/null &
        pids+=("$!")
    else
        mkfifo "$scratch/$index"
        (trap '' TERM INT HUP; prefixed "$index") <"$scratch/$index" &
        readers+=("$!")
        "${LINE[@]}" </dev/null >"$scratch/$index" 2>&1 &
        pids+=("$!")
    fi
done
[[ -z $caught ]] || forward "$caught"  # it came while they were being started

# Takes note of who has ended, and sets the deadline for the rest.
deadline=
look() {
    local index code
    for index in "${!pids[@]}"; do
        [[ -z ${codes[index]:-} ]] || continue
        ! kill -0 "${pids[index]}" 2>/dev/null || continue
        code=0
        wait "${pids[index]}" 2>/dev/null || code=$?
        codes[index]=$code
        ((code == 0)) || say "process $index ended with exit code $code"
        if [[ -z $deadline ]] && ((code != 0 || index == 0)); then
            deadline=$((SECONDS + grace))
        fi
    done
}

while look; ((${#codes[@]} < count)); do
    if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
        for index in "${!pids[@]}"; do
            [[ -z ${codes[index]:-} ]] || continue
            say "process $index still runs $grace s after another ended; killing it"
            kill -KILL -- "-${pids[index]}" 2>/dev/null || true
        done
    fi
    # A builtin with a time limit: a 'sleep' would take the terminal's Ctrl-C for itself.
    read -r -t 0.2 -u "$tick" || true
done

# What a process left behind, such as workers of its data loader, would hold the pipes open.
for index in "${!pids[@]}"; do
    kill -KILL -- "-${pids[index]}" 2>/dev/null || true
done
for reader in "${readers[@]}"; do
    wait "$reader" 2>/dev/null || true
done
for ((index = 0; index < count; index++)); do
    ((codes[index] == 0)) || exit "${codes[index]}"
done
