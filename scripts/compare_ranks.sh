#!/usr/bin/env bash
# Shows what the ranks of a broadcast printed, and says whether all hold the same image. Called by the broadcast demos.
#
#   compare_ranks.sh FOLDER RANKS   # FOLDER/rank.0, FOLDER/rank.1, …: what each of them printed
set -euo pipefail

folder=$1
ranks=$2
for ((rank = 0; rank < ranks; rank++)); do
    cat "$folder/rank.$rank"
done
digests=$(sed -n 's/^rank [0-9]*: image *//p' "$folder"/rank.*)
rates=$(sed -n 's/^rank [0-9]*: Staged .*(\([0-9.]*\) GB\/s).*/\1/p' "$folder"/rank.*)
[ "$(wc -l <<<"$digests")" -eq "$ranks" ] || { echo "error: not every rank has an image" >&2; exit 1; }
if [ "$(sort -u <<<"$digests" | wc -l)" -ne 1 ]; then
    echo "images equal: False"
    exit 1
fi
echo "images equal: True ($ranks ranks, each verified; $(sort -n <<<"$rates" | head -n 1) GB/s at the slowest)"
