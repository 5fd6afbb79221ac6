# shellcheck shell=bash
# shellcheck disable=SC2154 # work is set by guests-in-lab.sh
# What bench/peers/qemu-in-lab and bench/peers/programs-in-lab share: QEMU's monitor and its own
# migration. Sourced after guests-in-lab.sh; the monitor of NAME is at NAME.qmp, its console's socket
# at NAME.tty.

# qmp NAME COMMAND [ARGUMENTS]: the command's answer. (The socket is new each time, so that nobody
# has to keep it.)
qmp() {
    local command="{\"execute\":\"$2\"${3:+,\"arguments\":$3}}"
    printf '%s\n' '{"execute":"qmp_capabilities"}' "$command" |
        socat -t 3 - "UNIX-CONNECT:$work/$1.qmp" | jq -cs 'map(select(has("return") or has("error"))) | .[1]'
}

ordered() { # NAME COMMAND [ARGUMENTS]: as qmp; it must succeed.
    local answer
    answer=$(qmp "$@")
    [[ $answer == *'"return"'* ]] || fail "$2: ${answer:-no answer}"
}

type_at_qemu() { printf '%s\n' "$2" | socat -t 0.2 - "UNIX-CONNECT:$work/$1.tty" >/dev/null; }

answers() { [[ $(qmp "$1" query-status 2>/dev/null) == *'"return"'* ]]; }

# await_qemu FROM TO KIND PORT: has TO listen for what FROM is to send, and both agree on QEMU's
# pre-copy (the guest is slowed until that converges) or post-copy.
await_qemu() {
    local each capabilities
    case $3 in
    qemu-precopy*) capabilities='{"capability":"auto-converge","state":true}' ;;
    *) capabilities='{"capability":"postcopy-ram","state":true}' ;;
    esac
    [[ $3 != qemu-preempt* ]] || capabilities+=',{"capability":"postcopy-preempt","state":true}'
    capabilities+=',{"capability":"events","state":true}'
    for each in "$1" "$2"; do
        ordered "$each" migrate-set-capabilities "{\"capabilities\":[$capabilities]}"
        ordered "$each" migrate-set-parameters '{"max-bandwidth":10737418240,"max-postcopy-bandwidth":0}'
    done
    ordered "$2" migrate-incoming "{\"uri\":\"tcp:$LAB_RDMA_ADDR:$4\"}"
}

# The ways in which a migration ends, as its events say.
is_over() { [[ $(<"$work/$1.events") =~ \"status\":\ \"(completed|failed|cancelled)\" ]]; }

# migrate_qemu FROM KIND PORT: sets `migration` to QEMU's account of the move. Waits for QEMU's
# events: asking it again and again would take processor time from what is measured.
migrate_qemu() {
    local from=$1 monitor listener
    rm -f "$work/$from.orders"
    mkfifo "$work/$from.orders"
    : >"$work/$from.events"
    socat -t 1 - "UNIX-CONNECT:$work/$from.qmp" <"$work/$from.orders" >>"$work/$from.events" & listener=$!
    exec {monitor}>"$work/$from.orders"
    printf '%s\n' '{"execute":"qmp_capabilities"}' \
        "{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:$LAB_RDMA_ADDR:$3\"}}" >&"$monitor"
    [[ $2 == qemu-precopy* ]] || echo '{"execute":"migrate-start-postcopy"}' >&"$monitor"
    wait_for "QEMU's migration is over" "$from" is_over "$from"
    exec {monitor}>&-
    wait "$listener" || true
    migration=$(qmp "$from" query-migrate)
    [[ $(jq -r '.return.status' <<<"$migration") == completed ]] || fail "QEMU's migration: $migration"
}
