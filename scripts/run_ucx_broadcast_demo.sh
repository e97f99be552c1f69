#!/usr/bin/env bash
# Broadcasts a plan's version over UCX: rank 0 reads it, every other rank pulls it from the one before, and all verify every byte.
# Only rank 0 may read the source, and nothing that lies on this host already is reused, so what is measured really moved.
#
#   run_ucx_broadcast_demo.sh plan.json
#
# Without RANK all ranks run on this host, and their images are compared. With RANK just that one runs, as under a launcher:
#   WORLD_SIZE    how many ranks (default 2)
#   RANK          which one this is
#   MASTER_ADDR   rank 0's host, or all ranks' hosts separated by commas (default 127.0.0.1; others need HOTWEIGHTS_PEER_TOKEN)
#   MASTER_PORT   rank r listens at this port plus r (default 19999)
#   HOTWEIGHTS_ROOTS   folders that rank 0 may read (default: the current one and the plan's)
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

[ $# -eq 1 ] || { echo "usage: ${0##*/} plan.json" >&2; exit 2; }
plan=$1
export WORLD_SIZE=${WORLD_SIZE:-2} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-19999}
export HOTWEIGHTS_CLIENT_METRICS_PORT=${HOTWEIGHTS_CLIENT_METRICS_PORT:-0}
[ -f "$plan" ] || fail "there is no plan $plan; write one with \`hotweights plan\`"
command -v hotweights >/dev/null || fail "there is no hotweights in PATH; pip install -e '.[extras]', or activate its environment"
[[ $WORLD_SIZE =~ ^[0-9]{1,4}$ ]] && [ "$WORLD_SIZE" -ge 2 ] || fail "WORLD_SIZE is $WORLD_SIZE; a broadcast has at least two ranks"

folder=$(mktemp -d "${TMPDIR:-/tmp}/hotweights-demo.XXXXXX")
ranks=()

finish() {
    trap - EXIT INT TERM
    [ "${#ranks[@]}" -eq 0 ] || kill "${ranks[@]}" 2>/dev/null || true
    wait || true
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

replicate() { # as which rank; only ever in the background, whose process it becomes
    mkdir -p "$folder/nothing" "$folder/home.$1"
    local roots=(--root "$folder/nothing")
    if [ "$1" = 0 ]; then
        roots=()
        [ -n "${HOTWEIGHTS_ROOTS:-}" ] || roots=(--root . --root "$(dirname -- "$plan")")
    fi
    RANK=$1 exec hotweights replicate --plan "$plan" --ucx --verify --home "$folder/home.$1" ${roots[@]+"${roots[@]}"}
}

if [ -n "${RANK:-}" ]; then
    replicate "$RANK" &
    ranks=($!)
    wait "${ranks[0]}"
    exit
fi

for ((rank = 0; rank < WORLD_SIZE; rank++)); do
    replicate "$rank" >"$folder/rank.$rank" &
    ranks+=($!)
done
for _ in "${ranks[@]}"; do
    wait -n || fail "a rank failed; see what it said above"
done
ranks=()

"$(dirname -- "$0")/compare_ranks.sh" "$folder" "$WORLD_SIZE"
