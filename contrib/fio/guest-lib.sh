# shellcheck shell=dash
# contrib/fio/guest-lib.sh - what the guest scripts share; sourced as /fio/guest-lib.sh in the guest.
#
# Every check prints one line, "ok" or "FAIL"; `finish` prints the totals and exits non-zero when a
# check failed or the kernel saw an error of the disk.

passed=0
failed=0

# check WHAT COMMAND...: the command must succeed; its output is shown when it does not.
check() {
    what=$1
    shift
    read -r began _ </proc/uptime
    if "$@" >/tmp/output 2>&1; then
        read -r ended _ </proc/uptime
        passed=$((passed + 1))
        printf 'ok    %s (%d s)\n' "$what" $((${ended%.*} - ${began%.*}))
    else
        status=$?
        failed=$((failed + 1))
        printf 'FAIL  %s (status %d)\n' "$what" "$status"
        tail -n 20 /tmp/output | sed 's/^/      /'
    fi
}

# run_fio JOBS ARGUMENT...: one job file of this folder, on $DISK; shows what it read and wrote.
run_fio() {
    jobs=$1
    shift
    check "fio $jobs $*" fio --output-format=terse --terse-version=3 --output=/tmp/fio.out "$@" "/fio/$jobs"
    # Terse output, version 3: 5 is the error, 6 and 47 KiB read and written, 8 and 49 IOPS.
    awk -F';' 'NF > 50 {
        printf "      %s: read %d MiB at %d IOPS, wrote %d MiB at %d IOPS%s\n",
            $3, $6 / 1024, $8, $47 / 1024, $49, $5 ? ", ERROR " $5 : ""
    }' /tmp/fio.out
}

# Reads must come from the disk, not from this guest's memory.
drop_caches() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

no_kernel_errors() {
    ! dmesg | grep -E 'I/O error|critical .* error|EXT4-fs error|XFS.*orrupt|BUG:|Oops|Call Trace|blocked for more'
}

finish() {
    check "no disk error in the kernel's log" no_kernel_errors
    echo "guest: $passed checks passed, $failed failed"
    [ "$failed" = 0 ]
    exit
}
