#!/usr/bin/env bash
# Two workers that follow a coordinator and talk over UCX (TCP where UCX does not work). The second one joins late and may not
# read the source: all it gets, it gets from the first one. They follow every version until Ctrl-C.
#
#   HOTWEIGHTS_COORD    the coordinator (default tcp://127.0.0.1:5555); start one with `hotweights coord-serve`
#   HOTWEIGHTS_ROOTS    folders that the first worker may read (default: the current one)
#   LATE_SECONDS        how long the second worker waits (default 5)
#
# Metrics of the first worker: http://localhost:9099/metrics
set -euo pipefail

endpoint="${HOTWEIGHTS_COORD:-tcp://127.0.0.1:5555}"
folder="$(mktemp -d "${TMPDIR:-/tmp}/hotweights-demo.XXXXXX")"
mkdir "$folder/first" "$folder/late" "$folder/nothing"
workers=()

finish() {
    trap - EXIT INT TERM
    [ "${#workers[@]}" -eq 0 ] || kill "${workers[@]}" 2>/dev/null || true
    wait || true
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

hotweights worker --endpoint "$endpoint" --ucx --pinned --no-mpi --worker-id demo-first --socket-folder "$folder/first" &
workers+=($!)
sleep "${LATE_SECONDS:-5}"
HOTWEIGHTS_METRICS_PORT=0 HOTWEIGHTS_ROOTS= hotweights worker --endpoint "$endpoint" --ucx --pinned --no-mpi \
    --worker-id demo-late --socket-folder "$folder/late" --root "$folder/nothing" &
workers+=($!)

wait -n "${workers[@]}"
