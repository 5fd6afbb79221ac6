# shellcheck shell=bash
# What demo-in-lab and bench/peers/qemu-moves share: processes with guests, by name, and what their
# guests print. Sourced with the program's name, which begins its messages, and how many seconds it
# waits for anything. Sets `work`, where NAME.log and NAME.console are: the scratch directory is no
# place for sockets.

readonly program=$1 patience_s=$2
work=$(mktemp -d "/run/$program.XXXXXX")
readonly work
# The process of each name.
declare -A processes

# Shows why, and the end of what processes and guests have said.
fail() {
    local each
    echo "$program: $*" >&2
    for each in "$work"/*.log "$work"/*.console; do
        [[ -s $each ]] || continue
        echo "  the end of ${each##*/}:" >&2
        tail -n 12 "$each" | tr -d '\r' | sed 's/^/  | /' >&2
    done
    exit 1
}

# Keeps what there is to see, whatever happens, and leaves nothing else behind: not all of this is in a lab, which ends.
# shellcheck disable=SC2317 # by the trap
keep() {
    cp "$work"/*.log "$work"/*.console "$LAB_SCRATCH" 2>/dev/null || true
    local each
    for each in "${processes[@]}"; do
        # One that ended may have left its number to somebody else. SIGKILL ends those that stand still, too.
        [[ $(ps -o ppid= -p "$each") -eq $$ ]] || continue
        # shellcheck disable=SC2046 # words are what they are
        kill -KILL "$each" $(children "$each") 2>/dev/null || true
    done
    rm -rf "$work"
}
trap keep EXIT

# children PID: all that it has started, and what they have.
children() {
    local each
    # shellcheck disable=SC2013 # words are what they are
    for each in $(cat "/proc/$1/task/"*"/children" 2>/dev/null); do
        children "$each"
        echo "$each"
    done
}

# wait_for WHAT NAME COMMAND...: until COMMAND succeeds, as long as NAME's process is alive.
wait_for() {
    local what=$1 name=$2 end=$((SECONDS + patience_s))
    shift 2
    until "$@"; do
        kill -0 "${processes[$name]}" 2>/dev/null || fail "the process \"$name\" ended; waiting for: $what"
        ((SECONDS < end)) || fail "not within $patience_s s: $what"
        sleep 0.1
    done
}

# Whole lines that the guest has printed at NAME.
printed() { sed -n 's/\r$//; s/^pcguest: //p' "$work/$1.console" 2>/dev/null; }
# Reads all of it: what ends early ends the reader before it in a pipe, which is a failure.
has_printed() { printed "$1" | grep -E -- "$2" >/dev/null; }
has_reported() { (($(printed "$1" | grep -c '"stall_us".*}$') >= $2)); }

# Whether pcvm listens at NAME's control socket.
listens() { [[ -S $work/$1.sock ]]; }
