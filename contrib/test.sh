#!/usr/bin/env bash
# contrib/test.sh - every test there is: installs what they need, then runs the checks of check.sh,
# all cargo tests, the control socket with the Python package qemu.qmp, and a guest under QEMU.
#
# The last line is "N passed, N failed, N skipped" over all of them. Exit status 0 only when none
# failed. CI runs this.
#
# The cargo tests find in their environment:
#   QBLKD_TEST_REQUIRE=1  a missing tool is a failure, not a skipped test
#   QBLKD_TEST_PYTHON     a Python interpreter that has the package qemu.qmp

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$contrib/tally.sh"

cd "$repo"
make_scratch
target=${CARGO_TARGET_DIR:-$repo/target}

step "Tools"
need_rust
need_qemu
need_packages shellcheck:shellcheck git:git python3:python3 strace:strace
run "$contrib/mkguest.sh"
python=$target/python/bin/python
if ! "$python" -c 'import qemu.qmp' 2>/dev/null; then
    python3 -c 'import ensurepip' 2>/dev/null || need_packages python3-venv
    rm -rf "$target/python"
    mkdir -p "$target"
    python3 -m venv "$target/python"
    "$target/python/bin/pip" -q --disable-pip-version-check install qemu.qmp
fi
say "$(cargo --version); $(qemu-img --version | head -n 1); qemu.qmp for $("$python" --version)"
export QBLKD_TEST_REQUIRE=1 QBLKD_TEST_PYTHON=$python

script_test "cargo fmt" "$contrib/check.sh" fmt
script_test "cargo clippy" "$contrib/check.sh" clippy
script_test "cargo doc" "$contrib/check.sh" doc
script_test "shellcheck" "$contrib/check.sh" shell
script_test "this script's own counting" "$contrib/tally-test.sh"

script_test "small protocols under loom" "$contrib/check.sh" loom

step "cargo test"
cargo_tests() { cargo test --locked --no-fail-fast 2>&1 | tee "$scratch/cargo.log"; }
status=0
run cargo_tests || status=$?
count_cargo_tests "$scratch/cargo.log" "$status"

# What cargo test has built is the program with its assertions.
export QBLKD=${QBLKD:-$target/debug/qblkd}
# A management layer reads the manifest instead of asking the program.
manifest_test() {
    "$QBLKD" --print-capabilities >"$scratch/capabilities.json" || return
    "$python" - "$contrib/50-qemu-qblkd.json" "$scratch/capabilities.json" <<'END'
import json, sys
manifest, capabilities = (json.load(open(path)) for path in sys.argv[1:])
for member in ("type", "features"):
    if manifest[member] != capabilities[member]:
        sys.exit(f"{member}: the manifest says {manifest[member]}, qblkd {capabilities[member]}")
END
}
script_test "manifest" manifest_test
script_test "control socket" "$contrib/control-test.sh"
script_test "guest" "$contrib/guest-test.sh"
script_test "guest: snapshots" "$contrib/guest-snapshots.sh"

step "Result"
print_tally
