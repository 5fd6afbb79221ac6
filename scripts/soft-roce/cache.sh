# shellcheck shell=bash
# The lab's cache: an unpacked kernel package and the initramfs made from it.
#
# Sourced by `lab`. Each entry is made whole in a directory of its own beside
# its place, written to the disk, and renamed: whoever is killed on the way
# leaves only a `making.*`, which the next writer removes. One writer at a
# time, by a lock; readers need none.
#
#   $lab_cache/kernel/VERSION/          boot/vmlinuz-VERSION, lib/modules/VERSION
#   $lab_cache/initramfs/VERSION-HASH   HASH over all that goes into it
#
# POSTCOPY_LAB_CACHE names another place; POSTCOPY_LAB_KERNEL_DEB a package file
# that is used in place of the distribution's linux-image-amd64.

lab_cache=${POSTCOPY_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/postcopy-lab}

# In the order of loading; each with its dependencies. rxe needs a crc32 first.
# What else a COMMAND wants: modprobe -d "$LAB_KERNEL_ROOT" NAME
lab_modules=(crc32_generic crc32c_generic virtio_pci 9pnet_virtio 9p
    ib_uverbs rdma_cm rdma_ucm rdma_rxe veth)

prepare_kernel() {
    mkdir -p "$lab_cache/kernel" "$lab_cache/initramfs" || return 1
    lab_cache=$(cd "$lab_cache" && pwd -P)
    find_kernel || locked make_kernel && find_kernel
}

# Sets kernel_version, kernel_root and kernel_image to the newest in the cache,
# or to the one of POSTCOPY_LAB_KERNEL_DEB.
find_kernel() {
    local wanted='*'
    [[ -z ${POSTCOPY_LAB_KERNEL_DEB:-} ]] || wanted=$(kernel_of "$POSTCOPY_LAB_KERNEL_DEB") || return 1
    kernel_version=$(cd "$lab_cache/kernel" && compgen -G "$wanted/boot" | cut -d/ -f1 |
        grep -v '^making' | sort -V | tail -n 1) || return 1
    kernel_root=$lab_cache/kernel/$kernel_version
    kernel_image=$kernel_root/boot/vmlinuz-$kernel_version
}

# The file name is the package's: linux-image-VERSION_...
kernel_of() {
    local name
    name=$(dpkg-deb -f "$1" Package) && echo "${name#linux-image-}" | sed 's/-unsigned$//'
}

# locked FUNCTION: with no other writer, and what dead writers left removed.
locked() {
    (
        exec 9>"$lab_cache/lock"
        flock 9
        rm -rf "$lab_cache"/*/making.*
        "$@"
    )
}

make_kernel() {
    find_kernel && return
    local making=$lab_cache/kernel/making.$$ deb version
    mkdir "$making" || return 1
    deb=${POSTCOPY_LAB_KERNEL_DEB:-}
    [[ -n $deb ]] || deb=$(download_kernel "$making") || return 1
    version=$(kernel_of "$deb") || return 1
    unpack_kernel "$deb" "$making/root" "$version" || return 1
    publish "$making/root" "$lab_cache/kernel/$version" && rm -rf "$making"
}

download_kernel() {
    local package
    package=$(kernel_package) || package=''
    if [[ -z $package ]]; then
        as_root apt-get update -q >&2
        package=$(kernel_package) || return 1
    fi
    echo "lab: fetching $package" >&2
    (cd "$1" && { fetch "$package" || { as_root apt-get update -q && fetch "$package"; }; }) >&2 || return 1
    compgen -G "$1/*.deb"
}

kernel_package() {
    apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | grep .
}

fetch() { apt-get -q -o APT::Sandbox::User=root download "$1"; }

unpack_kernel() { # DEB ROOT VERSION
    dpkg-deb -x "$1" "$2" || return 1
    [[ -e $2/lib ]] || ln -s usr/lib "$2/lib"
    rm -rf "$2"/usr/share "$2/lib/modules/$3"/kernel/{sound,drivers/gpu,drivers/media}
    depmod -b "$2" "$3" || return 1
    [[ -s $2/boot/vmlinuz-$3 ]] || { echo "lab: no kernel in $1" >&2; return 1; }
}

publish() { # MADE PLACE
    sync -f "$1" && mv -T "$1" "$2" && sync -f "$2"
}

prepare_initramfs() {
    local hash
    hash=$(cat "$here/init" "$here/cache.sh" /bin/busybox | sha256sum | cut -c1-16)
    initramfs=$lab_cache/initramfs/$kernel_version-$hash
    [[ -s $initramfs ]] || locked make_initramfs
}

make_initramfs() {
    [[ ! -s $initramfs ]] || return 0
    local making=$lab_cache/initramfs/making.$$
    mkdir -p "$making"/root/{bin,modules,dev,proc,sys,io,host} || return 1
    cp /bin/busybox "$making/root/bin/busybox"
    install -m 755 "$here/init" "$making/root/init"
    copy_modules "$making/root/modules" || return 1
    (cd "$making/root" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet) >"$making/packed" || return 1
    publish "$making/packed" "$initramfs" && rm -rf "$making"
}

# The modules side by side, and for each way to start a list in loading order.
copy_modules() {
    copy_with_dependencies "$1" "${lab_modules[@]}" >"$1/order" &&
        copy_with_dependencies "$1" kvm-amd >"$1/order.svm" &&
        copy_with_dependencies "$1" kvm-intel >"$1/order.vmx"
}

copy_with_dependencies() { # DIRECTORY MODULE...
    local into=$1 each path
    shift
    for each in "$@"; do
        modprobe -d "$kernel_root" -S "$kernel_version" --show-depends "$each" || return 1
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' |
        while read -r path; do copy_module "$path" "$into" || return 1; done
}

copy_module() { # PATH DIRECTORY; prints its name
    local name=${1##*/}
    name=${name%.ko*}.ko
    case $1 in
    *.xz) xz -dc "$1" ;;
    *.zst) zstd -dcq "$1" ;;
    *) cat "$1" ;;
    esac >"$2/$name" && echo "$name"
}
