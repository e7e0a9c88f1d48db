#!/usr/bin/env bash
# TPU slices of a GKE cluster, through xpk: one process in each pod.
#
#   launch/gke.sh start --name=NAME --cluster=CLUSTER --type=TYPE --image=IMAGE \
#       -- run --config=FILE --workdir=DIR [...]
#
#   start    submit the command after --; the cluster restarts it after preemption
#   log      follow the log of the first pod, which is the one that prints
#   status   list the workloads of that name
#   resume   submit again under the same name, once the restarts are used up or it was deleted
#   delete   delete the workload; the cluster's machines stay, and cost what they cost
#
#   --type=TYPE        TPU type, such as v5litepod-16
#   --slices=N         how many slices work together (1)
#   --image=IMAGE      an image with swe_prune and jax[tpu] installed
#   --shards=N         N independent workloads instead, NAME-0 to NAME-(N-1), which share the cells
#                      of a sweep; each on a slice of one machine
#   --restarts=N       how often the cluster starts it again (100)
#   --notice=SECONDS   between the announcement of preemption and the kill, to save in (120)
#   --project=, --zone=, --extra=FLAG   go to xpk; --extra may be given several times, such as
#                      --extra=--storage=NAME for the volume that holds the workdir
#   --dry-run          print the commands and run nothing
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name= cluster= type= slices= image= shards= restarts= notice= project= zone= extra=" "$@"
step=${WORDS[0]:-}
case $step in
    start | log | status | resume | delete) ;;
    *) die "'$step' is no step; take one of start, log, status, resume, delete" ;;
esac
words 1
check_name
need cluster my-cluster
name=${OPTION[name]}
slices=${OPTION[slices]:-1}
restarts=${OPTION[restarts]:-100}
notice=${OPTION[notice]:-120}
whole "--slices" "$slices" 1
whole "--restarts" "$restarts" 0
whole "--notice" "$notice" 1
names=("$name")
if [[ -n ${OPTION[shards]:-} ]]; then
    whole "--shards" "${OPTION[shards]}" 1
    ((slices == 1)) || die "--slices=$slices does not go with --shards, whose runs do not work" \
        "together; leave one of them out"
    names=()
    for ((index = 0; index < OPTION[shards]; index++)); do names+=("$name-$index"); done
fi
case $step in
    start | resume)
        need type v5litepod-16
        need image gcr.io/my-project/swe_prune
        check_training
        ;;
esac
have xpk "install it with 'pip install xpk'"

common=(--cluster="${OPTION[cluster]}")
[[ -z ${OPTION[project]:-} ]] || common+=(--project="${OPTION[project]}")
[[ -z ${OPTION[zone]:-} ]] || common+=(--zone="${OPTION[zone]}")

# exec, so that xpk's SIGTERM reaches Python itself and not a shell around it.
start() {  # start NAME [SHARD]
    local line=(exec "$PYTHON" -m swe_prune "${TRAIN[@]}")
    if [[ -n ${2:-} ]]; then
        line+=(--shard="$2")
    elif ! has_shard; then
        line+=(--distributed)
    fi
    perform xpk workload create --workload="$1" --tpu-type="${OPTION[type]}" \
        --num-slices="$slices" --docker-image="${OPTION[image]}" --command="$(quoted "${line[@]}")" \
        --max-restarts="$restarts" --restart-on-exit-codes="$PREEMPTED" \
        --termination-grace-period-seconds="$notice" "${EXTRA[@]}" "${common[@]}"
}

start_all() {
    local index
    for index in "${!names[@]}"; do
        start "${names[index]}" "${OPTION[shards]:+$index/${OPTION[shards]}}"
    done
}

delete_all() {
    local one
    for one in "${names[@]}"; do
        perform xpk workload delete --workload="$one" --force "${common[@]}"
    done
}

# xpk shows no logs; kubectl is set to the cluster by any xpk command before. The labels are those of
# the first pod of the first slice.
log() {
    local labels=jobset.sigs.k8s.io/jobset-name=${names[0]},jobset.sigs.k8s.io/job-index=0
    labels+=,batch.kubernetes.io/job-completion-index=0
    have kubectl "install it with 'gcloud components install kubectl'"
    perform kubectl logs --follow --tail=-1 --selector="$labels"
}

case $step in
    start) start_all ;;
    log) log ;;
    status) perform xpk workload list --filter-by-job="^$name" "${common[@]}" ;;
    resume) delete_all; start_all ;;
    delete) delete_all ;;
esac
