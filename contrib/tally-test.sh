#!/usr/bin/env bash
# contrib/tally-test.sh - tests tally.sh: a count that hides a failure would make CI green.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

make_scratch

# tally LOG STATUS [SCRIPT...]: what test.sh would print last, and its exit status, for one run of
# cargo test and some script tests.
tally() {
    local status=0
    bash -c '
        . "$0/lib.sh"
        . "$0/tally.sh"
        count_cargo_tests "$1" "$2"
        shift 2
        for script; do script_test "$script" bash -c "$script"; done
        print_tally
    ' "$contrib" "$@" >"$scratch/out" 2>&1 || status=$?
    echo "$(tail -n 1 "$scratch/out") -> $status"
}

# expect TEXT ARGUMENT...: tally ARGUMENT... must give TEXT.
expect() {
    local expected=$1 got
    shift
    got=$(tally "$@")
    if [[ $got != "$expected" ]]; then
        cat "$scratch/out" >&2
        die "tally $*: '$got' instead of '$expected'"
    fi
}

cat >"$scratch/good" <<'END'
     Running unittests src/lib.rs (target/debug/deps/qblkd-1)
test units::tests::adds ... ok
test units::tests::slow ... ignored, takes minutes
test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s
output of a child without its newline: test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s
   Doc-tests qblkd
test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
END
cat >"$scratch/bad" <<'END'
test it::refuses ... FAILED
test it::panics - should panic ... FAILED
test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s
test result: ok. 4 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.10s
END
printf '\033[1mtest result: \033[32mok\033[0m. 7 passed; 0 failed; 0 ignored; 0 measured\n' >"$scratch/coloured"
echo 'error: could not compile `qblkd`' >"$scratch/no_build"
echo 'test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured' >"$scratch/none"

expect "15 passed, 0 failed, 1 skipped -> 0" "$scratch/good" 0
expect "17 passed, 0 failed, 2 skipped -> 0" "$scratch/good" 0 true 'exit 77' true
expect "16 passed, 2 failed, 1 skipped -> 1" "$scratch/good" 0 false true 'kill -9 $$'
expect "9 passed, 2 failed, 2 skipped -> 1" "$scratch/bad" 101
grep -qx '    FAILED: cargo test it::refuses' "$scratch/out" || die "the failed test is not named"
expect "9 passed, 2 failed, 2 skipped -> 1" "$scratch/bad" 0
expect "7 passed, 0 failed, 0 skipped -> 0" "$scratch/coloured" 0
# A test program that crashed leaves no result line.
expect "15 passed, 1 failed, 1 skipped -> 1" "$scratch/good" 101
expect "0 passed, 1 failed, 0 skipped -> 1" "$scratch/no_build" 101
expect "0 passed, 1 failed, 0 skipped -> 1" "$scratch/none" 0
say "tally.sh counts as it should"
