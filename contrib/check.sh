#!/usr/bin/env bash
# contrib/check.sh [STEP...] - what must hold before a commit: fmt, clippy, doc, shell, loom, test.
# All of them without an argument. Stops at the first that fails. The tests that need a guest and the tools
# that they need are contrib/test.sh's business. One more step, msrv, compiles everything with the
# oldest Rust that Cargo.toml allows, if rustup has it.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

check_fmt() { cargo fmt --check; }
check_clippy() { cargo clippy --all-targets --locked -- -D warnings; }
check_doc() { RUSTDOCFLAGS="-D warnings ${RUSTDOCFLAGS-}" cargo doc --no-deps --locked; }
check_loom() { (cd loom && cargo test --release --locked); }
check_test() { cargo test --locked; }

check_msrv() {
    local oldest
    oldest=$(msrv)
    if ! have rustup || ! rustup toolchain list | grep -q "^${oldest}[.-]"; then
        warn "SKIPPED: no Rust $oldest here (rustup toolchain install $oldest --profile minimal)"
        return
    fi
    cargo "+$oldest" check --all-targets --locked --target-dir "${CARGO_TARGET_DIR:-target}/msrv"
}

check_shell() {
    if ! have shellcheck; then
        warn "SKIPPED: shellcheck is not installed"
        return
    fi
    git ls-files -z -- '*.sh' .ci/run | xargs -0 shellcheck
}

cd "$repo"
[[ $# -gt 0 ]] || set -- fmt clippy doc shell loom test
for name in "$@"; do
    [[ $(type -t "check_$name") == function ]] ||
        die "no step '$name': fmt, clippy, doc, shell, loom, test, msrv"
done
for name in "$@"; do
    [[ $# == 1 ]] || step "check: $name"
    run "check_$name"
done
