# shellcheck shell=bash
# shellcheck disable=SC2154 # work is set by guests-in-lab.sh
# What bench/peers/qemu-moves and bench/peers/programs-in-lab share: QEMU's monitor and its own
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

# listen NAME: keeps a client at NAME's monitor, whose words, events among them, are in NAME.events. Sets
# `orders` to the descriptor that takes its orders, and `listener` to its process, which ends when that closes.
listen() {
    rm -f "$work/$1.orders"
    mkfifo "$work/$1.orders"
    : >"$work/$1.events"
    socat -t 1 - "UNIX-CONNECT:$work/$1.qmp" <"$work/$1.orders" >>"$work/$1.events" & listener=$!
    exec {orders}>"$work/$1.orders"
    echo '{"execute":"qmp_capabilities"}' >&"$orders"
}

# event_us NAME EVENT: when that happened at NAME, in microseconds.
event_us() {
    jq -r --arg event "$2" 'select(.event == $event) | .timestamp | .seconds * 1000000 + .microseconds' \
        "$work/$1.events" | head -n 1
}

# migrate_qemu FROM TO KIND PORT: sets `migration` to QEMU's account of the move, and `downtime_ms` to what
# lies between the guest's stop at FROM and its start at TO, as their events say. (QEMU's account of a
# post-copy's downtime ends when the state has been sent.) Waits for QEMU's events: asking it again and again
# would take processor time from what is measured.
migrate_qemu() {
    local from=$1 to=$2 orders listener to_orders to_listener
    listen "$to"
    to_orders=$orders to_listener=$listener
    listen "$from"
    echo "{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"tcp:$LAB_RDMA_ADDR:$4\"}}" >&"$orders"
    [[ $3 == qemu-precopy* ]] || echo '{"execute":"migrate-start-postcopy"}' >&"$orders"
    wait_for "QEMU's migration is over" "$from" is_over "$from"
    # The second has inherited the first's orders.
    exec {orders}>&-
    wait "$listener" || true
    exec {to_orders}>&-
    wait "$to_listener" || true
    migration=$(qmp "$from" query-migrate)
    [[ $(jq -r '.return.status' <<<"$migration") == completed ]] || fail "QEMU's migration: $migration"
    downtime_ms=$(jq -n "($(event_us "$to" RESUME) - $(event_us "$from" STOP)) / 1000")
}
