# shellcheck shell=bash
# contrib/tally.sh - counts tests for test.sh; sourced after lib.sh. A script test is a command:
# status 0 passed, 77 skipped, anything else failed.

passed=0 failed=0 skipped=0
failures=() skips=()

# script_test NAME COMMAND...
script_test() {
    local name=$1 status=0
    shift
    step "test: $name"
    run "$@" || status=$?
    case $status in
    0) passed=$((passed + 1)) ;;
    77)
        skipped=$((skipped + 1))
        skips+=("$name")
        ;;
    *)
        failed=$((failed + 1))
        failures+=("$name (status $status)")
        say "FAILED: $name (status $status)"
        ;;
    esac
}

# count_cargo_tests LOG STATUS: adds up the "test result:" lines, one per test program, and names
# what failed or was ignored. A status that no counted failure explains (no build, a test program
# that crashed) and a run without any test are failures too.
count_cargo_tests() {
    local ran run_passed run_failed run_ignored line
    read -r ran run_passed run_failed run_ignored < <(
        sed 's/\x1b\[[0-9;]*m//g' "$1" | awk '
            # Found anywhere in a line: a program under test may have left its last line open.
            match($0, /test result: (ok|FAILED)\. [0-9]+ passed; [0-9]+ failed; [0-9]+ ignored/) {
                split(substr($0, RSTART, RLENGTH), word, " ")
                passed += word[4]; failed += word[6]; ignored += word[8]
            }
            END { print passed + failed, passed + 0, failed + 0, ignored + 0 }'
    )
    passed=$((passed + run_passed))
    failed=$((failed + run_failed))
    skipped=$((skipped + run_ignored))
    while read -r line; do
        line=${line#test }
        case $line in
        *' ... FAILED'*) failures+=("cargo test ${line%% ... *}") ;;
        *' ... ignored'*) skips+=("cargo test ${line%% ... *}") ;;
        esac
    done < <(sed 's/\x1b\[[0-9;]*m//g' "$1" | grep '^test ')
    if [[ $2 != 0 && $run_failed == 0 ]]; then
        failed=$((failed + 1))
        failures+=("cargo test: status $2 without a failed test (no build, or a test program crashed)")
    elif [[ $2 == 0 && $run_failed != 0 ]]; then
        failures+=("cargo test: status 0 in spite of failed tests")
    elif [[ $ran == 0 ]]; then
        failed=$((failed + 1))
        failures+=("cargo test: ran no test")
    fi
}

# print_tally: what was skipped and failed, by name; the totals as the last line. Fails when a test
# failed, and when there was none.
print_tally() {
    local name
    for name in "${skips[@]}"; do say "SKIPPED: $name"; done
    for name in "${failures[@]}"; do say "FAILED: $name"; done
    echo "$passed passed, $failed failed, $skipped skipped"
    [[ $failed == 0 && $passed -gt 0 ]]
}
