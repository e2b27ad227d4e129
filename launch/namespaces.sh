#!/usr/bin/env bash
# Several hosts on one machine: network namespaces host0, host1, ... of 10.77.0.1, 10.77.0.2, ...,
# joined by a switch, each with its own shaped link. Linux, root, iproute2.
#
#   bash launch/namespaces.sh up N [RATE [BURST]]   N hosts; RATE of each link as tc takes it: 100mbit
#   bash launch/namespaces.sh run I COMMAND...      run COMMAND on host I
#   bash launch/namespaces.sh rate N RATE [BURST]   shape the links of hosts that are up anew
#   bash launch/namespaces.sh delay N MS            every packet takes MS to the other host; 0: as before
#   bash launch/namespaces.sh down                  remove them all
#
# A recipe over two of them, a shell each:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.77.0.1 RANKS=2 bash launch/namespaces.sh run 0 bash launch/torchrun.sh RECIPE
#   NODES=2 NODE_RANK=1 MASTER_ADDR=10.77.0.1 RANKS=2 bash launch/namespaces.sh run 1 bash launch/torchrun.sh RECIPE
# HOSTS=mine calls them mine0, mine1, ...: a second set, with a switch of its own.
# Without `delay`, a packet takes what it takes on this machine: some tens of microseconds.
set -euo pipefail
HOST=${HOSTS:-host} SWITCH=${HOSTS:-host}-switch LINK=scpl0
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# shape NAMESPACE INTERFACE RATE BURST: what leaves there. tbf's bucket must hold what the rate gives
# in one tick of the kernel's clock, and a packet of segmentation offload (64 KiB).
shape() {
    tc -n "$1" qdisc replace dev "$2" root tbf rate "$3" burst "$4" latency 50ms
}

shape_all() {
    local i
    for ((i = 0; i < $1; i++)); do
        shape "$HOST$i" "$LINK" "$2" "$3"
        shape "$SWITCH" "port$i" "$2" "$3"
    done
}

up() {
    local count=$1 i
    ip netns add "$SWITCH"
    ip -n "$SWITCH" link add br0 type bridge
    ip -n "$SWITCH" link set br0 up
    for ((i = 0; i < count; i++)); do
        ip netns add "$HOST$i"
        ip -n "$HOST$i" link set lo up
        ip -n "$HOST$i" link add "$LINK" type veth peer name "port$i" netns "$SWITCH"
        ip -n "$SWITCH" link set "port$i" master br0 up
        ip -n "$HOST$i" addr add "10.77.0.$((i + 1))/24" dev "$LINK"
        ip -n "$HOST$i" link set "$LINK" up
    done
    if [[ -n ${2:-} ]]; then shape_all "$count" "$2" "${3:-512kb}"; fi
}

end_processes() {  # those in the switch: nothing but delay.py runs there
    ip netns pids "$SWITCH" 2>/dev/null | xargs -r kill
}

# A bridge has no delay, and not every kernel has netem: delay.py takes the bridge's place.
delay() {
    local count=$1 ms=$2 i ports=()
    end_processes
    for ((i = 0; i < count; i++)); do
        if [[ $ms == 0 ]]; then
            ip -n "$SWITCH" link set "port$i" master br0
        else
            ip -n "$SWITCH" link set "port$i" nomaster
            ports+=("port$i")
        fi
    done
    if [[ $ms != 0 ]]; then ip netns exec "$SWITCH" python3 "$HERE/delay.py" "$ms" "${ports[@]}"; fi
}

case ${1:-} in
    up) up "${2:?how many hosts}" "${3:-}" "${4:-}" ;;
    rate) shape_all "${2:?how many hosts}" "${3:?a rate such as 100mbit}" "${4:-512kb}" ;;
    delay) delay "${2:?how many hosts}" "${3:?milliseconds}" ;;
    run)
        # Gloo and DeepSpeed would take the address of the machine's name, which no host has.
        exec ip netns exec "$HOST${2:?which host}" env GLOO_SOCKET_IFNAME="$LINK" "${@:3}"
        ;;
    down)
        end_processes
        for name in $(ip netns list | awk '{print $1}' | grep -E "^$HOST([0-9]+|-switch)$"); do
            ip netns del "$name"
        done
        ;;
    *)
        sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
        exit 2
        ;;
esac
