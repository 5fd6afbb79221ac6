# shellcheck shell=bash
# What building this project needs from Debian beside a Rust toolchain. Sourced by `demo` and
# `test`; the finding and installing is the lab's.

# shellcheck source=scripts/soft-roce/packages.sh
. "$(dirname "${BASH_SOURCE[0]}")/soft-roce/packages.sh"

# file to look for | package that brings it | why
# shellcheck disable=SC2034 # used by those who source this
build_needs='
cc|gcc|linking, and the C parts of two bindings
/usr/include/stdio.h|libc6-dev|C headers for the bindings
/usr/include/linux/userfaultfd.h|linux-libc-dev|the kernel interface of userfaultfd
clang|clang|reading C headers for the bindings
/usr/lib/llvm-*/lib/libclang.so*|libclang-dev|reading C headers for the bindings
cmake|cmake|the part of the verbs binding that opens libibverbs at run time
make|make|the same
cpio|cpio|packing the guest image'
# shellcheck disable=SC2034
test_needs='
unshare|util-linux|tests that hide a device
setpriv|util-linux|tests that drop privileges
openssl|openssl|the certificates that docs/tls.md has made
mkfs.ext4|e2fsprogs|the disks of QEMU guests in the lab
qemu-storage-daemon|qemu-system-common|a disk of a guest that another process serves'
