#!/usr/bin/env bash
# Broadcasts a plan's version by MPI: rank 0 reads it, all get every bucket as it comes, and each rank verifies every byte.
# Only rank 0 may read the source, and nothing that lies on this host already is reused, so what is measured really moved.
#
#   run_mpi_broadcast_demo.sh plan.json
#
# Without RANK mpiexec starts all ranks on this host, and their images are compared. With RANK just that one runs, as under a
# launcher that knows nothing of MPI:
#   WORLD_SIZE    how many ranks (default 2)
#   RANK          which one this is
#   MASTER_ADDR   rank 0's host (default 127.0.0.1; others need HOTWEIGHTS_PEER_TOKEN)
#   MASTER_PORT   where the ranks meet (default 19999)
#   HOTWEIGHTS_ROOTS   folders that rank 0 may read (default: the current one and the plan's)
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

[ $# -eq 1 ] || { echo "usage: ${0##*/} plan.json" >&2; exit 2; }
plan=$1
ranks=${WORLD_SIZE:-2}
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-19999}
export HOTWEIGHTS_CLIENT_METRICS_PORT=${HOTWEIGHTS_CLIENT_METRICS_PORT:-0}
[ -f "$plan" ] || fail "there is no plan $plan; write one with \`hotweights plan\`"
hotweights=$(command -v hotweights) || fail "there is no hotweights in PATH; pip install -e '.[extras]', or activate its environment"
[[ $ranks =~ ^[0-9]{1,4}$ ]] && [ "$ranks" -ge 2 ] || fail "WORLD_SIZE is $ranks; a broadcast has at least two ranks"
mpiexec=$(dirname -- "$hotweights")/mpiexec
[ -x "$mpiexec" ] || mpiexec=$(command -v mpiexec.hydra) || fail "there is no MPICH; pip install -e '.[mpi]'"

folder=$(mktemp -d "${TMPDIR:-/tmp}/hotweights-demo.XXXXXX")
running=

finish() {
    trap - EXIT INT TERM
    [ -z "$running" ] || kill "$running" 2>/dev/null || true
    wait || true
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir -p "$folder/nothing"
first=(--root "$folder/nothing" --root . --root "$(dirname -- "$plan")")
[ -z "${HOTWEIGHTS_ROOTS:-}" ] || first=()
replicate=("$hotweights" replicate --plan "$plan" --mpi --verify)

if [ -n "${RANK:-}" ]; then
    export WORLD_SIZE=$ranks
    [ "$RANK" = 0 ] || first=(--root "$folder/nothing")
    "${replicate[@]}" --home "$folder/home" ${first[@]+"${first[@]}"} &
    running=$!
    wait "$running"
    exit
fi

unset WORLD_SIZE # the ranks have it from mpiexec
others=()
for ((rank = 1; rank < ranks; rank++)); do
    others+=(: -n 1 "${replicate[@]}" --home "$folder/home.$rank" --root "$folder/nothing")
done
"$mpiexec" -disable-auto-cleanup -outfile-pattern "$folder/rank.%r" \
    -n 1 "${replicate[@]}" --home "$folder/home.0" ${first[@]+"${first[@]}"} "${others[@]}" </dev/null &
running=$!
wait "$running" || fail "a rank failed; see what it said above"
running=

"$(dirname -- "$0")/compare_ranks.sh" "$folder" "$ranks"
