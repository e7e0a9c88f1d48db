#!/usr/bin/env bash
# Submits a run to Slurm: one process on each node, or an array of shards for a sweep.
#
#   launch/slurm.sh --name=NAME --nodes=N [OPTION...] -- run --config=FILE --workdir=DIR [...]
#   launch/slurm.sh --name=NAME --shards=N [OPTION...] -- run --config=FILE --workdir=DIR [...]
#
#   --nodes=N       how many nodes work together (1)
#   --shards=N      N independent one-node jobs instead, which share the cells of a sweep
#   --gpus=G        GPUs of each node, all used by its one process
#   --time=LIMIT    as sbatch takes it, such as 4:00:00; the run goes on in the next slot
#   --notice=S      seconds before the limit at which the run is told to save (120)
#   --extra=FLAG    goes to sbatch as it is, such as --extra=--partition=gpu; may be repeated
#   --dry-run       print the commands and run nothing, not even Slurm
#
# What runs on the nodes is slurm.sbatch beside this script. LAUNCH_PYTHON is the interpreter there.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name= nodes= shards= gpus= time= notice= extra=" "$@"
words 0
check_name
check_training
nodes=${OPTION[nodes]:-1}
notice=${OPTION[notice]:-120}
whole "--nodes" "$nodes" 1
whole "--notice" "$notice" 1
flags=(--job-name="${OPTION[name]}" --nodes="$nodes" --ntasks-per-node=1)
# Without "B:" the signal goes to what srun started, and not to the batch script around it.
flags+=(--signal="TERM@$notice" --requeue --open-mode=append)
[[ -z ${OPTION[time]:-} ]] || flags+=(--time="${OPTION[time]}")
if [[ -n ${OPTION[gpus]:-} ]]; then
    whole "--gpus" "${OPTION[gpus]}" 1
    flags+=(--gpus-per-node="${OPTION[gpus]}")
fi
if [[ -n ${OPTION[shards]:-} ]]; then
    whole "--shards" "${OPTION[shards]}" 1
    ((nodes == 1)) || die "--nodes=$nodes does not go with --shards, whose runs do not work" \
        "together; leave one of them out"
    flags+=(--array="0-$((OPTION[shards] - 1))" --output="${OPTION[name]}-%A_%a.log")
else
    flags+=(--output="${OPTION[name]}-%j.log")
fi
have sbatch "run this on a login node of the cluster"
perform sbatch "${flags[@]}" "${EXTRA[@]}" "$HERE/slurm.sbatch" "${OPTION[shards]:-0}" "${TRAIN[@]}"
if dry; then
    note "which runs on the first node, of each job:"
    LAUNCH_DRY_RUN=yes bash "$HERE/slurm.sbatch" "${OPTION[shards]:-0}" "${TRAIN[@]}"
fi
