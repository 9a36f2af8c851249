# shellcheck shell=bash
# contrib/lib.sh - what the scripts beside it share; sourced, never run.
#
# Owns: messages with elapsed time, orderly clean-up, installing packages, starting and stopping a
# block server. Owns no policy: what is built, booted or tested is decided by the scripts.
#
# Rules that the scripts rely on:
# - clean-up runs on every way out, last registered first, and keeps the exit status;
# - every child that may run for long is in its own process group, so that ending a script ends all
#   that it started;
# - temporary files live in a private directory: any number of users and runs work side by side.

set -euo pipefail

contrib=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$contrib")

# ---- messages ------------------------------------------------------------------------------

# Seconds since boot: unlike SECONDS, a jump of the wall clock does not move it.
uptime_seconds() {
    local up
    read -r up _ </proc/uptime
    echo "${up%.*}"
}

# Shared with the scripts that a script runs, so that all show the same clock.
export QBLKD_STARTED_AT=${QBLKD_STARTED_AT:-$(uptime_seconds)}

# step TEXT...: the header of one step.
step() {
    printf '\n==> [%3d s] %s\n' "$(($(uptime_seconds) - QBLKD_STARTED_AT))" "$*"
}

say() { printf '    %s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# ---- clean-up ------------------------------------------------------------------------------

cleanup_commands=()

# on_exit COMMAND: evaluated when the script ends, whatever ends it.
on_exit() { cleanup_commands+=("$1"); }

run_cleanup() {
    local status=$? index
    trap - EXIT
    trap '' INT TERM HUP
    set +e
    for ((index = ${#cleanup_commands[@]} - 1; index >= 0; index--)); do
        eval "${cleanup_commands[index]}"
    done
    exit "$status"
}
trap run_cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# make_scratch: sets `scratch` to a private directory that is removed at the end. In /tmp unless
# TMPDIR says otherwise; short, because a socket's path may have 107 bytes only.
make_scratch() {
    # shellcheck disable=SC2034 # for the script that calls this
    scratch=$(mktemp -d "${TMPDIR:-/tmp}/qblkd.XXXXXX")
    on_exit 'rm -rf -- "$scratch"'
}

# ---- children ------------------------------------------------------------------------------

# start COMMAND...: runs it in the background in a process group of its own; sets `started_pid`.
start() {
    set -m
    "$@" </dev/null &
    started_pid=$!
    set +m
    on_exit "stop_group $started_pid"
}

# stop_group PID: ends the process group of a child: SIGTERM, five seconds, SIGKILL.
stop_group() {
    local tries
    kill -TERM -- "-$1" 2>/dev/null || return 0
    for ((tries = 0; tries < 50; tries++)); do
        kill -0 -- "-$1" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$1" 2>/dev/null || true
}

# run COMMAND...: like the bare command, but a signal to this script ends the command too (bash
# would hold the signal back until a foreground child has ended).
run() {
    start "$@"
    wait "$started_pid"
}

# ---- packages ------------------------------------------------------------------------------

have() { command -v "$1" >/dev/null 2>&1; }

package_version() {
    local state version
    read -r state version < <(dpkg-query -W -f '${db:Status-Status} ${Version}\n' "$1" 2>/dev/null) || return 1
    [[ $state == installed ]] && echo "$version"
}

as_root() {
    if [[ $(id -u) == 0 ]]; then
        "$@"
    else
        sudo -- "$@"
    fi
}

# apt_prepare PACKAGE...: checks that PACKAGEs could be installed here, and fetches current package
# lists into a private directory: the system's own lists may be years old or locked, and are not
# ours to change. Sets `apt_dir` and `apt_options`.
apt_prepare() {
    [[ -z ${apt_dir-} ]] || return 0
    if ! have apt-get || ! have dpkg; then
        die "please install these by hand (they are named as in Debian, and this is neither Debian nor Ubuntu): $*"
    fi
    [[ $(id -u) == 0 ]] || have sudo || die "not root and no sudo: please install: $*"
    apt_dir=$(mktemp -d "${TMPDIR:-/tmp}/qblkd-apt.XXXXXX")
    on_exit 'as_root rm -rf -- "$apt_dir"'
    mkdir -p "$apt_dir/sources" "$apt_dir/lists/partial" "$apt_dir/cache"
    # The same sources as the system's, as a copy that a suite can be added to.
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [[ ! -f $file ]] || cp "$file" "$apt_dir/sources/"
    done
    [[ ! -f $apt_dir/sources/sources.list ]] || mv "$apt_dir/sources/sources.list" "$apt_dir/sources/system.list"
    apt_options=(
        -qq
        -o Dir::Etc::SourceList=/dev/null
        -o Dir::Etc::SourceParts="$apt_dir/sources"
        -o Dir::State::Lists="$apt_dir/lists"
        -o Dir::Cache::pkgcache="$apt_dir/cache/pkgcache.bin"
        -o Dir::Cache::srcpkgcache="$apt_dir/cache/srcpkgcache.bin"
        # The private directory is closed to apt's own download user.
        -o APT::Sandbox::User=root
        -o DPkg::Lock::Timeout=300
        -o Acquire::Retries=3
    )
    apt_update "$@"
}

apt_update() {
    as_root apt-get "${apt_options[@]}" update || die "no package lists; please install: $*"
}

# apt_install ARGUMENT...: packages (or PACKAGE=VERSION, or -t SUITE) without recommended ones.
apt_install() {
    say "apt-get install $*"
    as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l \
        apt-get "${apt_options[@]}" -y -o Dpkg::Use-Pty=0 --no-install-recommends install "$@" </dev/null >"$apt_dir/log" 2>&1 || {
        tail -n 20 "$apt_dir/log" >&2
        die "apt-get could not install: $*"
    }
}

# need_packages WANT...: installs what is missing. WANT is PACKAGE, or COMMAND:PACKAGE where having
# the command is enough, wherever it comes from.
need_packages() {
    local want missing=()
    for want in "$@"; do
        if [[ $want == *:* ]]; then
            have "${want%%:*}" || missing+=("${want##*:}")
        else
            package_version "$want" >/dev/null || missing+=("$want")
        fi
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    apt_prepare "${missing[@]}"
    apt_install "${missing[@]}"
}

# add_backports: adds RELEASE-backports to the private sources, from wherever RELEASE comes from;
# sets `backports`. Fails when no source of that form is known.
add_backports() {
    local codename
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    [[ -n $codename ]] || return 1
    backports=$codename-backports
    local file
    for file in "$apt_dir"/sources/*.list; do
        [[ -f $file ]] || continue
        sed -En "s/^(deb[[:space:]]+(\[[^]]*\][[:space:]]+)?[^[:space:]]+[[:space:]]+)$codename([[:space:]])/\1$backports\3/p" \
            "$file" >>"$apt_dir/sources/qblkd-backports.list"
    done
    for file in "$apt_dir"/sources/*.sources; do
        [[ -f $file ]] || continue
        # Stanza by stanza: those that have RELEASE itself among their suites.
        awk -v RS= -v ORS='\n\n' -v suite="$codename" -v backports="$backports" '
            {
                lines = split($0, line, "\n"); out = ""; found = 0
                for (i = 1; i <= lines; i++) {
                    if (line[i] ~ /^#/) continue
                    if (line[i] ~ /^[Ss]uites:/) {
                        words = split(line[i], word, /[ \t]+/)
                        for (j = 2; j <= words; j++) if (word[j] == suite) found = 1
                        line[i] = "Suites: " backports
                    }
                    out = out line[i] "\n"
                }
                if (found) print out
            }' "$file" >>"$apt_dir/sources/qblkd-backports.sources"
    done
    [[ -s $apt_dir/sources/qblkd-backports.list || -s $apt_dir/sources/qblkd-backports.sources ]] || return 1
    apt_update qemu-system-x86 qemu-utils
}

apt_offers() { # PACKAGE VERSION
    as_root apt-cache "${apt_options[@]}" madison "$1" | awk -v version="$2" '$3 == version { found = 1 } END { exit !found }'
}

# need_qemu: qemu-system-x86_64 and the tools (qemu-img, qemu-io, qemu-storage-daemon), of one
# version. A distribution's own emulator would replace tools that came from its backports (or mix
# with them), so what is missing is taken from where the other half came from.
need_qemu() {
    local system utils missing present version
    if ! have qemu-system-x86_64 || ! have qemu-img; then
        apt_prepare qemu-system-x86 qemu-utils
        system=$(package_version qemu-system-x86) || system=
        utils=$(package_version qemu-utils) || utils=
        missing=qemu-system-x86 present=qemu-utils version=$utils
        [[ -z $system ]] || missing=qemu-utils present=qemu-system-x86 version=$system
        if [[ -z $version ]]; then
            apt_install qemu-system-x86 qemu-utils
        elif apt_offers "$missing" "$version"; then
            apt_install_qemu "$missing" "$version"
        elif add_backports && apt_offers "$missing" "$version"; then
            apt_install_qemu "$missing" "$version"
        elif [[ -n ${backports-} && $version == *~bpo* ]]; then
            say "$present $version is no longer offered: taking both from $backports"
            apt_install -t "$backports" qemu-system-x86 qemu-utils
        else
            apt_install qemu-system-x86 qemu-utils
        fi
    fi
    system=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9.]*\).*/\1/p')
    utils=$(qemu-img --version | sed -n 's/.*version \([0-9.]*\).*/\1/p')
    [[ $system == "$utils" ]] || warn "qemu-system-x86_64 is $system but qemu-img is $utils; going on with both"
}

# apt_install_qemu PACKAGE VERSION: with the parts of the emulator that must have its version.
apt_install_qemu() {
    local package wanted=("$1=$2")
    if [[ $1 == qemu-system-x86 ]]; then
        for package in qemu-system-common qemu-system-data; do
            ! apt_offers "$package" "$2" || wanted+=("$package=$2")
        done
    fi
    if [[ -n ${backports-} ]]; then
        apt_install -t "$backports" "${wanted[@]}"
    else
        apt_install "${wanted[@]}"
    fi
}

# need_rust: a Rust tool chain cannot come from a distribution that is older than our MSRV.
need_rust() {
    have cargo || die "cargo is missing: install Rust $(msrv) or newer, with rustup for example"
    # zstd's C sources are compiled by the build.
    need_packages cc:gcc cc:libc6-dev
}

msrv() { sed -n 's/^rust-version *= *"\(.*\)".*/\1/p' "$repo/Cargo.toml"; }

# ---- servers -------------------------------------------------------------------------------

# SERVER=qemu-storage-daemon runs any of the guest scripts against QEMU's server instead of ours:
# the way to tell whether a failure is ours or the rig's. QBLKD names another qblkd binary.
SERVER=${SERVER:-qblkd}

# create_image FILE SIZE: an empty qcow2 image, made by the tools of the server under test.
create_image() {
    case $SERVER in
    qblkd) "$QBLKD" create "$1" "$2" ;;
    qemu-storage-daemon) qemu-img create -q -f qcow2 "$1" "$2" ;;
    *) die "SERVER must be qblkd or qemu-storage-daemon, not '$SERVER'" ;;
    esac
}

# use_qblkd [release|debug]: sets QBLKD, unless it is set, to a binary that is built now.
use_qblkd() {
    [[ $SERVER == qblkd ]] || return 0
    if [[ -z ${QBLKD-} ]]; then
        local options=()
        [[ $1 == debug ]] || options=(--release)
        run cargo build --locked --manifest-path "$repo/Cargo.toml" "${options[@]}"
        QBLKD=${CARGO_TARGET_DIR:-$repo/target}/$1/qblkd
    fi
    [[ -x $QBLKD ]] || die "no program $QBLKD"
}

# start_server SOCKET IMAGE LOG QUEUES [OPTION...]: sets `server_pid`; returns once the socket is
# there. OPTIONs are the server's own.
start_server() {
    case $SERVER in
    qblkd)
        start "$QBLKD" --socket-path "$1" --blk-file "$2" --num-queues "$4" "${@:5}" >"$3" 2>&1
        ;;
    qemu-storage-daemon)
        start qemu-storage-daemon \
            --blockdev "driver=file,node-name=file,filename=$2,discard=unmap" \
            --blockdev driver=qcow2,node-name=disk,file=file,discard=unmap \
            --export "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=$1,num-queues=$4,writable=on" \
            "${@:5}" >"$3" 2>&1
        ;;
    *) die "SERVER must be qblkd or qemu-storage-daemon, not '$SERVER'" ;;
    esac
    server_pid=$started_pid
    wait_for_socket "$1" "$server_pid" || {
        sed 's/^/    /' "$3" >&2
        die "$SERVER did not start to listen on $1"
    }
}

# wait_for_socket PATH PID: until PATH is a socket; fails when PID ends first, or after 10 s.
wait_for_socket() {
    local tries
    for ((tries = 0; tries < 200; tries++)); do
        [[ ! -S $1 ]] || return 0
        kill -0 "$2" 2>/dev/null || return 1
        sleep 0.05
    done
    return 1
}

# stop_server LOG: SIGTERM, then like wait_for_server.
stop_server() {
    kill -TERM "$server_pid" 2>/dev/null || true
    wait_for_server "$1"
}

# wait_for_server LOG: it must end within a minute, with status 0.
wait_for_server() {
    local status=0 tries
    for ((tries = 0; tries < 600; tries++)); do
        kill -0 "$server_pid" 2>/dev/null || break
        sleep 0.1
    done
    [[ $tries -lt 600 ]] || die "$SERVER did not end within 60 s after it was told to"
    wait "$server_pid" || status=$?
    [[ $status == 0 ]] || {
        sed 's/^/    /' "$1" >&2
        die "$SERVER ended with status $status"
    }
}
