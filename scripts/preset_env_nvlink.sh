# Hosts with NVLink between their GPUs, NVMe, and several fast network cards. Source it: . scripts/preset_env_nvlink.sh
export HOTWEIGHTS_USE_GDS=1          # files straight into GPU memory, where a probe read proves that it works
export HOTWEIGHTS_P2P_CONCURRENCY=8  # donors at a time
export UCX_MAX_RNDV_RAILS=4          # network cards that one transfer is spread over
