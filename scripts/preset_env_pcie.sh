# Hosts with GPUs on PCIe, one network card, and CPUs that have other work as well. Source it: . scripts/preset_env_pcie.sh
export HOTWEIGHTS_USE_GDS=0          # through page-locked host memory (--pinned): on PCIe the detour costs little
export HOTWEIGHTS_P2P_CONCURRENCY=4  # donors at a time
export UCX_MAX_RNDV_RAILS=1          # one network card
