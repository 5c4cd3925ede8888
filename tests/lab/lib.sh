# shellcheck shell=bash
# What the labs share (tests/xen/run, tests/qemu/run): roots and images made of Debian packages alone, in a work folder,
# and machines that QEMU emulates. On this machine nothing is installed but small tools, if they are missing, and nothing
# outside of the work folder is changed.
#
# Sourced with `set -euo pipefail`. Each step leaves a stamp that holds what it was made from, and is done again when
# that has changed, so a second run begins with the machines.

work=${SNAPFS_LAB:-/var/tmp/snapfs-lab}
lab=$(dirname "${BASH_SOURCE[0]}")
project=$(cd "$lab/../.." && pwd)
suite=bookworm
began=$SECONDS
passed=0
failed=0

# Where a run is: `note TEXT`. Checks go to standard output, this does not.
note() {
    printf '[%4d s] %s\n' $((SECONDS - began)) "$*" >&2
}

# Ends the lab with the reason: `give_up TEXT`.
give_up() {
    note "$*"
    exit 1
}

# A check and what came of it, when it was known: `verdict ok|not-ok TEXT`.
verdict() {
    if [ "$1" = ok ]; then
        passed=$((passed + 1))
        printf '[%4d s] ok: %s\n' $((SECONDS - began)) "$2"
    else
        failed=$((failed + 1))
        printf '[%4d s] FAILED: %s\n' $((SECONDS - began)) "$2"
    fi
}

# A check that is a command: `check TEXT COMMAND...`.
check() {
    if "${@:2}"; then
        verdict ok "$1"
    else
        verdict not-ok "$1"
    fi
}

# The last line, and the exit status of the lab.
finish() {
    note "done"
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
}

# The work folder, for this lab alone, with the tools of this machine that all steps need: `prepare`.
prepare() {
    [ "$(id -u)" -eq 0 ] || give_up "this lab makes file systems with owners: run it as root"
    tools mmdebstrap:mmdebstrap cpio:cpio mke2fs:e2fsprogs sfdisk:fdisk flock:util-linux
    mkdir -p "$work"
    work=$(cd "$work" && pwd)
    exec 9>"$work/lock"
    flock -n 9 || give_up "another lab works in $work; SNAPFS_LAB names another folder"
}

# Installs what is missing of this, never at the cost of what is there: `tools TOOL:PACKAGE...`.
tools() {
    local tool missing=()
    for tool in "$@"; do
        command -v "${tool%:*}" >/dev/null || missing+=("${tool#*:}")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null || give_up "not installed: ${missing[*]}"
    note "installing ${missing[*]}"
    apt-get -qq update </dev/null || true
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-remove --no-install-recommends "${missing[@]}" \
        </dev/null >/dev/null || give_up "cannot install ${missing[*]}"
}

# Sets `snapfs` to the program to test, which SNAPFS names or cargo builds.
program() {
    if [ -z "${SNAPFS:-}" ]; then
        note "cargo build --release"
        (cd "$project" && cargo build --release --quiet) || give_up "the program does not build"
        SNAPFS=$project/target/release/snapfs
    fi
    snapfs=$(realpath "$SNAPFS")
    # Of other programs of a host that is configured, nothing may be found.
    unset SNAPFS_STORE SNAPFS_LOG
    export SNAPFS_CONFIG=$work/no-such-file.toml
    note "$("$snapfs" --version)"
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

# What stands for the content of files in the input of a step: `content FILE...`.
content() {
    cat "$@" | sha256sum
}

# A folder with the files of packages: `bootstrap VARIANT NAME PACKAGE,...`.
bootstrap() {
    local root=$work/$2
    rm -rf "$root"
    mmdebstrap --quiet --variant="$1" --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
        --aptopt='Apt::Install-Recommends "false"' --include="$3" "$suite" "$root" \
        "deb $(mirror $suite) $suite main" "deb $(mirror $suite-security) $suite-security main" \
        </dev/null >"$work/$2.log" 2>&1 9>&- || {
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
    # Without these libxl takes no locks, and then guests that end leave their memory behind.
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

# The disk of a guest, $work/guest.img: a Debian with systemd and a boot loader, which runs tests/lab/guest-check.
guest_image() {
    guest_root
    once guest.img "$guest_packages $(content "$lab"/lib.sh "$lab"/guest-*)" make_guest_image
}

# What is checked inside of the guest: programs, libraries, modules, kernel, and noise that does not compress.
guest_folders=(boot usr/bin usr/sbin usr/lib srv/noise)

make_guest_image() {
    local root=$work/guest version
    version=$(cd "$root/lib/modules" && echo *)
    echo guest >"$root/etc/hostname"
    echo 'LABEL=lab / ext4 rw 0 1' >"$root/etc/fstab"
    install -m 755 "$lab/guest-check" "$root/usr/local/sbin/guest-check"
    install -D -m 644 "$lab/guest-check.service" "$root/etc/systemd/system/guest-check.service"
    ln -sfn ../guest-check.service "$root/etc/systemd/system/multi-user.target.wants/guest-check.service"
    mkdir -p "$root/boot/grub"
    sed "s/VERSION/$version/" "$lab/guest-grub.cfg" >"$root/boot/grub/grub.cfg"
    [ -f "$root/srv/noise" ] || head -c 16M /dev/urandom >"$root/srv/noise"
    (cd "$root" && find "${guest_folders[@]}" -type f -print0 | sort -z | xargs -0 b2sum) >"$work/guest.sums"
    install -D -m 644 "$work/guest.sums" "$root/usr/local/share/guest.sums"
    # The loader lies between the partition table and the first partition, where its own installer would put it.
    chroot "$root" grub-mkimage --format=i386-pc --output=/run/core.img --prefix='(hd0,msdos1)/boot/grub' \
        biosdisk part_msdos ext2 normal linux serial terminal
    rm -f "$work/guest.img"
    truncate --size=1G "$work/guest.img"
    printf 'label: dos\nstart=2048, type=83, bootable\n' | sfdisk --quiet "$work/guest.img"
    dd if="$root/usr/lib/grub/i386-pc/boot.img" of="$work/guest.img" bs=440 count=1 conv=notrunc status=none
    dd if="$root/run/core.img" of="$work/guest.img" bs=512 seek=1 conv=notrunc status=none
    rm "$root/run/core.img"
    mke2fs -q -F -t ext4 -L lab -d "$root" -E offset=1048576 "$work/guest.img" 1023M
}

# Runs a machine in the root of QEMU until it is off, and hands each line of its serial port to the function `heard`;
# all of it goes to $work/NAME.serial: `machine NAME ARGUMENT...`. The status is QEMU's.
#
# The accelerator is always emulation: what a stock kernel makes of KVM inside of a virtual machine is nobody's to say.
machine() {
    local line serial=$work/$1.serial from
    shift
    mkdir -p "$work/qemu/var/tmp"
    : >"$serial"
    exec {from}< <(exec chroot "$work/qemu" qemu-system-x86_64 -accel tcg,thread=multi,tb-size=256 \
        -nodefaults -no-user-config -display none -monitor none -no-reboot -serial stdio "$@" </dev/null 2>&1 9>&-)
    machine_pid=$!
    while IFS= read -r -u "$from" line; do
        line=${line//$'\r'/}
        printf '%s\n' "$line" >>"$serial"
        heard "$line"
    done
    exec {from}<&-
    local status=0
    wait "$machine_pid" || status=$?
    machine_pid=
    return "$status"
}

# Ends a machine that is still running when the lab ends.
stop_machine() {
    [ -z "${machine_pid:-}" ] || kill "$machine_pid" 2>/dev/null || true
}
