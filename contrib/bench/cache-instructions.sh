#!/usr/bin/env bash
# contrib/bench/cache-instructions.sh [SLOTS...] - instructions per lookup of the metadata cache and
# of what it is compared with (see benches/cache.rs), counted by valgrind's callgrind.
#
# Each case runs twice with different numbers of lookups; the difference, divided, has no set-up in
# it. The lookups are hits in random order. An operation is one turn of the benchmark's loop: the
# pattern's step, the lookup, the load of the entry and, where there is one, the put.
#
# Exit status 1 when ours does not take the same number at every size.

. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

# Slots above which a case is left out: a linear search of them takes too long here.
scan_max=16000
names=(array flat get get+put scan probe)

need_packages valgrind:valgrind
cd "$repo"
[[ $# -gt 0 ]] || set -- 16 1000 64000 1000000
make_scratch
cargo bench --quiet --locked --bench cache --no-run --message-format=json >"$scratch/build.json"
bench=$(sed -n 's/.*"name":"cache".*"executable":"\([^"]*\)".*/\1/p' "$scratch/build.json" | tail -n 1)
[[ -x $bench ]] || die "cargo has built no benchmark"

# count NAME SLOTS LOOKUPS: instructions of the whole run.
count() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null \
        "$bench" --callgrind-case "$1" "$2" "$3" 2>&1 | sed -n 's/.*Collected : \([0-9]*\).*/\1/p'
}

# each NAME SLOTS: instructions per lookup, with one decimal.
each() {
    local few=$((1 << 16)) many=$((1 << 17)) first second
    if [[ $1 == scan ]]; then
        few=64 many=128
    fi
    first=$(count "$1" "$2" "$few")
    second=$(count "$1" "$2" "$many")
    awk -v instructions=$((second - first)) -v lookups=$((many - few)) \
        'BEGIN { printf "%.1f", instructions / lookups }'
}

printf '%9s' slots
printf ' %10s' "${names[@]}"
printf '\n'
declare -A least most
for slots; do
    printf '%9d' "$slots"
    for name in "${names[@]}"; do
        if [[ $name == scan && $slots -gt $scan_max ]]; then
            printf ' %10s' -
            continue
        fi
        value=$(each "$name" "$slots")
        printf ' %10s' "$value"
        least[$name]=$(printf '%s\n' "${least[$name]:-$value}" "$value" | sort -g | head -n 1)
        most[$name]=$(printf '%s\n' "${most[$name]:-$value}" "$value" | sort -g | tail -n 1)
    done
    printf '\n'
done

for name in get get+put; do
    awk -v name="$name" -v least="${least[$name]}" -v most="${most[$name]}" 'BEGIN {
        printf "%s: %s to %s instructions per lookup\n", name, least, most
        exit most - least > 0.5
    }' || die "$name does not take the same number of instructions at every size"
done
