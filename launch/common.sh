# Sourced by the scripts beside it: options, messages, and running or only printing a command.
# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is read by the scripts that source this file

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "$0: bash $BASH_VERSION is too old; install 4.4 or newer and run 'bash $0'" >&2
    exit 2
fi

readonly PREEMPTED=75                                # the exit code of a run that wants to go on
readonly COMMANDS="run plan train prune finetune evaluate report"
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
PYTHON=${LAUNCH_PYTHON:-python}                      # the interpreter, where the run will be

declare -A OPTION=()                                 # of --NAME=VALUE; flags are "yes"
WORDS=()                                             # arguments that are not options, before --
EXTRA=()                                             # of --extra=FLAG, for the cluster's own tool
TRAIN=()                                             # after --, for python -m swe_prune
REPLY=

# The dry run prints here, so that functions whose output is captured can print too.
exec 3>&1

# Ends with one sentence about a wrong input.
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

say() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
}

# Prints the comment at the head of the script.
usage() {
    sed -n '2,$ { /^#/!q; s/^# \{0,1\}//; p; }' "$0"
}

# parse "name= flag ..." ARGUMENT...: fills the variables above; NAME= takes a value.
parse() {
    local known=" $1 dry-run help " argument name
    shift
    while (($#)); do
        argument=$1
        shift
        name=${argument#--}
        name=${name%%=*}
        case $argument in
            --) TRAIN=("$@"); break ;;
            --*=*)
                [[ $known == *" $name= "* ]] || die "$(unknown "$argument" "$known")"
                OPTION[$name]=${argument#*=}
                [[ $name != extra ]] || EXTRA+=("${argument#*=}")
                [[ -n ${OPTION[$name]} ]] || die "--$name is empty; give it a value or leave it out"
                ;;
            --help) usage; exit 0 ;;
            --*)
                [[ $known != *" $name= "* ]] || die "--$name needs a value; write --$name=VALUE"
                [[ $known == *" $name "* ]] || die "$(unknown "$argument" "$known")"
                OPTION[$name]=yes
                ;;
            -h) usage; exit 0 ;;
            *) WORDS+=("$argument") ;;
        esac
    done
}

unknown() {
    local name names=""
    for name in $2; do names+=" --$name"; done
    echo "unknown option '$1'; known are$names, and what swe_prune is to get stands after --"
}

dry() {
    [[ ${OPTION[dry-run]:-} == yes ]]
}

# need NAME EXAMPLE: the option must have been given.
need() {
    [[ -n ${OPTION[$1]:-} ]] || die "--$1 is missing; give it, for example --$1=$2"
}

# whole WHAT VALUE LEAST: the value must be a whole number, that or above.
whole() {
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
        die "$1 is '$2', which is not a whole number of $3 or more; correct it"
    fi
}

# The name goes into names of machines, so their rules hold.
check_name() {
    need name my-run
    [[ ${OPTION[name]} =~ ^[a-z]([-a-z0-9]{0,34}[a-z0-9])?$ ]] ||
        die "--name=${OPTION[name]} is not a valid job name; take up to 36 of a-z, 0-9 and -," \
            "a letter first and no - last"
}

# words COUNT: no more words than that may stand before --.
words() {
    ((${#WORDS[@]} <= $1)) ||
        die "unexpected '${WORDS[$1]}'; what swe_prune is to get stands after --"
}

# Looks at what stands after --, before anything is created that costs money.
check_training() {
    local argument place="" example="-- run --config=FILE --workdir=DIR"
    ((${#TRAIN[@]})) || die "no swe_prune command was given; end with '$example'"
    [[ " $COMMANDS " == *" ${TRAIN[0]} "* ]] ||
        die "unknown swe_prune command '${TRAIN[0]}'; known are $COMMANDS"
    for argument in "${TRAIN[@]}"; do
        case $argument in
            --distributed | --coordinator | --coordinator=* | --process | --process=*)
                die "'$argument' is what this script sets itself; leave it out" ;;
            --shard | --shard=*)
                [[ -z ${OPTION[shards]:-}${OPTION[sweep]:-} ]] ||
                    die "'$argument' is what this script sets itself; leave it out" ;;
            --workdir | --workdir=*) place=given ;;
        esac
    done
    [[ -n $place || ${TRAIN[0]} == plan ]] ||
        die "no --workdir was given to swe_prune; end with '$example', a place that all processes see"
}

# True where the user gave a share of a sweep, which is a run on its own.
has_shard() {
    [[ " ${TRAIN[*]}" == *" --shard"* ]]
}

# quoted WORD...: one line that a shell reads back as these words.
quoted() {
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

# Runs a command; a dry run prints it instead.
perform() {
    if dry; then
        quoted "$@" >&3
    else
        "$@"
    fi
}

# ask ANSWER COMMAND...: REPLY becomes what the command prints, empty where it fails; a dry run prints
# the command and goes on as if it had answered ANSWER.
ask() {
    local answer=$1
    shift
    if dry; then
        quoted "$@" >&3
        REPLY=$answer
    else
        REPLY=$("$@" 2>/dev/null) || REPLY=
    fi
}

# A line of explanation, in a dry run only.
note() {
    if dry; then echo "# $*" >&3; fi
}

# have TOOL HINT: the program must be there, except for a dry run.
have() {
    dry || command -v "$1" >/dev/null || die "the program '$1' is not there; $2"
}
