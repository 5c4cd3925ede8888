# shellcheck shell=bash
# What the labs share (tests/xen/run, tests/qemu/run): roots and images made of Debian packages alone, in a work folder.
# Nothing is installed on this machine and nothing outside of the work folder is changed.
#
# Sourced with `set -euo pipefail`. Each step leaves a stamp that holds what it was made from, and is done again when
# that has changed, so a second run begins with the machines.

work=${SNAPFS_LAB:-/var/tmp/xenlab-work}
suite=bookworm
began=$SECONDS

# Where a run is: `note TEXT`. Checks go to standard output, this does not.
note() {
    printf '[%4d s] %s\n' $((SECONDS - began)) "$*" >&2
}

# Ends the lab with the reason: `give_up TEXT`.
give_up() {
    note "$*"
    exit 1
}

# Whether all of this is here: `need TOOL...`.
need() {
    local tool missing=()
    for tool in "$@"; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    [ "${#missing[@]}" -eq 0 ] || give_up "not installed: ${missing[*]}; see docs/TESTING.md"
    [ "$(id -u)" -eq 0 ] || give_up "this lab makes file systems with owners: run it as root"
}

# The mirrors that this machine's apt uses, or Debian's own: `mirror CODENAME`.
mirror() {
    local uri fallback=http://deb.debian.org/debian
    [ "$1" = "$suite" ] || fallback=http://deb.debian.org/debian-security
    uri=$(apt-get indextargets --format "\$(CODENAME)|\$(REPO_URI)" 'Created-By: Packages' 2>/dev/null |
        sed -n "s/^$1|//p" | grep -m 1 debian) || uri=$fallback
    printf '%s\n' "$uri"
}

# Does a step unless it was done with the same input: `once NAME INPUT COMMAND...`.
once() {
    local stamp=$work/$1.stamp input=$2
    [ "$(cat "$stamp" 2>/dev/null)" != "$input" ] || return 0
    rm -f "$stamp"
    note "$1"
    "${@:3}"
    printf '%s\n' "$input" >"$stamp"
}

# A folder with the files of packages: `bootstrap VARIANT NAME PACKAGE,...`.
bootstrap() {
    local root=$work/$2
    rm -rf "$root"
    mmdebstrap --quiet --variant="$1" --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
        --aptopt='Apt::Install-Recommends "false"' --include="$3" "$suite" "$root" \
        "deb $(mirror $suite) $suite main" "deb $(mirror $suite-security) $suite-security main" \
        </dev/null >"$work/$2.log" 2>&1 || {
        tail -n 20 "$work/$2.log" >&2
        give_up "cannot make the root $2: the log is $work/$2.log"
    }
}

# Files only: no script of a package has run, so what these would make is made here: `extracted NAME PACKAGE,...`.
extracted() {
    local root=$work/$1
    bootstrap extract "$1" "$2"
    ln -sfn bash "$root/bin/sh"
    [ ! -e "$root/bin/mawk" ] || ln -sfn mawk "$root/bin/awk"
    rm -rf "$root/var/run" "$root/var/lock"
    ln -s /run "$root/var/run"
    ln -s /run/lock "$root/var/lock"
    printf 'root:x:0:0:root:/root:/bin/bash\n' >"$root/etc/passwd"
    printf 'root:x:0:\n' >"$root/etc/group"
}

# A root as an installer makes it: `installed NAME PACKAGE,...`.
installed() {
    bootstrap minbase "$1" "$2"
}

qemu_packages=qemu-system-x86,libc-bin
guest_packages=systemd-sysv,udev,kmod,e2fsprogs,linux-image-cloud-amd64,initramfs-tools,grub-pc-bin,grub-common

qemu_root() {
    once qemu "$qemu_packages" extracted qemu "$qemu_packages"
}

guest_root() {
    once guest "$guest_packages" installed guest "$guest_packages"
}
