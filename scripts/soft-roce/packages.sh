# shellcheck shell=bash
# What the scripts of this directory need from Debian, and its installation.
#
# Sourced by `install`, `setup` and `lab`. It looks for each needed file first
# and calls apt-get once, only for the packages whose files are missing. It is
# no general package manager: on a system without apt-get it names what is
# missing and stops.

# file to look for | package that brings it | why
lab_needs='
qemu-system-x86_64|qemu-system-x86|the virtual machine
modprobe|kmod|dependencies of kernel modules
/bin/busybox|busybox-static|the initramfs of the lab
cpio|cpio|packing the initramfs
dpkg-deb|dpkg|unpacking the kernel package
xz|xz-utils|compressed kernel modules
flock|util-linux|one writer of the cache at a time
taskset|util-linux|the processors of the lab that run guests
ip|iproute2|the network link under Soft-RoCE
rdma|iproute2|adding the Soft-RoCE device
libibverbs.so.1|libibverbs1|the verbs library
librxe-rdmav|ibverbs-providers|the Soft-RoCE driver of the verbs library
librdmacm.so.1|librdmacm1|connections by RDMA address
ibv_devinfo|ibverbs-utils|looking at RDMA devices
ib_read_lat|perftest|the reference for latency and bandwidth'

host_needs='
modprobe|kmod|loading the rxe module
ip|iproute2|the network link under Soft-RoCE
rdma|iproute2|adding the Soft-RoCE device
libibverbs.so.1|libibverbs1|the verbs library
librxe-rdmav|ibverbs-providers|the Soft-RoCE driver of the verbs library
librdmacm.so.1|librdmacm1|connections by RDMA address
rdma-ndd|rdma-core|device nodes and their permissions
ib_read_lat|perftest|the reference for latency and bandwidth'

# is_present WHAT: a path or pattern, a library by the start of its name, or a command.
is_present() {
    case $1 in
    /*) compgen -G "$1" >/dev/null ;;
    lib*) compgen -G "/usr/lib/*/$1*" >/dev/null ||
        compgen -G "/usr/lib/*/libibverbs/$1*" >/dev/null ;;
    *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
    esac
}

# missing_packages NEEDS: a line "package why" for each need not met.
missing_packages() {
    local what package why
    while IFS='|' read -r what package why; do
        [[ -z $what ]] || is_present "$what" || printf '%s %s\n' "$package" "$why"
    done <<<"$1"
}

# as_root COMMAND...: directly, or by sudo for an ordinary user.
as_root() {
    if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

# install_needs NEEDS: true when everything is there in the end.
install_needs() {
    local missing packages
    missing=$(missing_packages "$1")
    [[ -n $missing ]] || return 0
    echo "installing:" >&2
    sed 's/^\([^ ]*\) /  \1: /' <<<"$missing" >&2
    if ! command -v apt-get >/dev/null; then
        echo "no apt-get here: install the equivalents by hand" >&2
        return 1
    fi
    mapfile -t packages < <(cut -d' ' -f1 <<<"$missing" | sort -u)
    apt_install "${packages[@]}" >&2 || return 1
    missing=$(missing_packages "$1")
    [[ -z $missing ]] || { echo "still missing: $missing" >&2; return 1; }
}

# The package lists may be absent or stale: refresh them once on failure.
apt_install() {
    local install=(env DEBIAN_FRONTEND=noninteractive
        apt-get install -y -q --no-install-recommends "$@")
    as_root "${install[@]}" || { as_root apt-get update -q && as_root "${install[@]}"; }
}
