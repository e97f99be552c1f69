# Coordinators that keep their state in Redis, so that another one takes over. Source it: . scripts/preset_env_redis.sh
export HOTWEIGHTS_COORD_BACKEND=redis
export HOTWEIGHTS_REDIS_URL=${HOTWEIGHTS_REDIS_URL:-redis://127.0.0.1:6379/0}
export HOTWEIGHTS_COORD_LEASE_SECONDS=${HOTWEIGHTS_COORD_LEASE_SECONDS:-5}  # a dead leader is replaced after that
