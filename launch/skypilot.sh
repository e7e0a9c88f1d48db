#!/usr/bin/env bash
# A managed job of SkyPilot: machines of any cloud, by default spot ones, started anew after preemption.
#
#   launch/skypilot.sh --name=NAME --bucket=URL --gpus=KIND:COUNT [--nodes=N] \
#       -- run --config=FILE --workdir=/swe_prune_runs/NAME [...]
#
#   --bucket=URL    such as gs://my-bucket; is mounted at /swe_prune_runs on all machines
#   --gpus=G        of each machine, such as H100:8
#   --nodes=N       how many machines work together (1)
#   --shards=N      N independent jobs instead, NAME-0 to NAME-(N-1), which share the cells of a sweep
#   --jax=EXTRA     the accelerator build of jax: cuda12 (default), cuda13 or tpu
#   --on-demand     machines that are not taken away, at the full price
#   --extra=FLAG    goes to 'sky jobs launch' as it is, such as --extra=--infra=gcp; may be repeated
#   --dry-run       print the commands and run nothing
#
# What runs on the machines is skypilot.yaml beside this script.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name= bucket= gpus= nodes= shards= jax= on-demand extra=" "$@"
words 0
check_name
need bucket gs://my-bucket
need gpus H100:8
check_training
[[ ${OPTION[bucket]} =~ ^[a-z0-9]+://[^/]+ ]] ||
    die "--bucket=${OPTION[bucket]} is no address of a bucket; write it as gs://NAME or s3://NAME"
nodes=${OPTION[nodes]:-1}
whole "--nodes" "$nodes" 1
jax=${OPTION[jax]:-cuda12}
case $jax in
    cuda12 | cuda13 | tpu) ;;
    *) die "--jax=$jax is no build of jax; take one of cuda12, cuda13, tpu" ;;
esac
shards=("")
if [[ -n ${OPTION[shards]:-} ]]; then
    whole "--shards" "${OPTION[shards]}" 1
    ((nodes == 1)) || die "--nodes=$nodes does not go with --shards, whose runs do not work" \
        "together; leave one of them out"
    shards=()
    for ((index = 0; index < OPTION[shards]; index++)); do shards+=("$index"); done
fi
have sky "install it with 'pip install skypilot' and the extra of your cloud"

cd "$ROOT"  # what SkyPilot copies to the machines
for shard in "${shards[@]}"; do
    line=("${TRAIN[@]}")
    [[ -z $shard ]] || line+=(--shard="$shard/${OPTION[shards]}")
    flags=(--name="${OPTION[name]}${shard:+-$shard}" --num-nodes="$nodes" --gpus="${OPTION[gpus]}")
    [[ -z ${OPTION[on-demand]:-} ]] || flags+=(--no-use-spot)
    flags+=(--env="BUCKET=${OPTION[bucket]}" --env="JAX=$jax")
    flags+=(--env="SWE_PRUNE=$(quoted "${line[@]}")")
    perform sky jobs launch "${flags[@]}" --detach-run --yes "${EXTRA[@]}" launch/skypilot.yaml
done
