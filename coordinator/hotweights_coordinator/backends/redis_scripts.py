"""What Redis itself decides, in Lua: who leads, and whether a write still counts.

A script runs alone in Redis, so what it compares is true at the moment it writes. Every script that
changes something first compares the lease's value, ``<identity>:<fence>``: a leader that was asleep
while another took over finds a foreign value and changes nothing. What replaces state also compares
the revision, which grows with every write: a write whose answer got lost, and that Redis runs late,
finds a foreign revision once its sender has read the state again.

Keys are handed in (``KEYS``: the lease, the hash of the state, the hash of blobs); the scripts know
no names. The state's own fields are ``fence`` (of the last lease given), ``endpoint`` (of who was
given it) and ``revision``. Each script answers a list whose first element says what came of it.
"""

from __future__ import annotations

_MINE = """
local holder = redis.call('GET', KEYS[1])
if holder ~= ARGV[1] then return {'fenced', holder or ''} end
"""
_UNCHANGED = (
    _MINE
    + """
local revision = redis.call('HGET', KEYS[2], 'revision') or '0'
if revision ~= ARGV[2] then return {'conflict', revision} end
"""
)

ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder then
  return {'held', holder, redis.call('HGET', KEYS[2], 'endpoint') or '', redis.call('PTTL', KEYS[1])}
end
local last = tonumber(redis.call('HGET', KEYS[2], 'fence') or '0')
if last < tonumber(ARGV[4]) then redis.call('HSET', KEYS[2], 'fence', ARGV[4]) end
local fence = redis.call('HINCRBY', KEYS[2], 'fence', 1)
redis.call('HSET', KEYS[2], 'endpoint', ARGV[2])
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. string.format('%.0f', fence), 'NX', 'PX', ARGV[3])
return {'acquired', fence, last}
"""
"""ARGV: identity, endpoint, lease in milliseconds, the highest fence that the caller ever saw.

The fence that Redis gives is above both its own last one and the caller's, so it grows even when
Redis lost its memory.
"""

RENEW = (
    _MINE
    + """
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {'ok'}
"""
)
"""ARGV: value, lease in milliseconds."""

RELEASE = (
    _MINE
    + """
redis.call('DEL', KEYS[1])
return {'ok'}
"""
)
"""ARGV: value."""

CLAIM = (
    _MINE
    + """
local revision = redis.call('HINCRBY', KEYS[2], 'revision', 1)
return {'ok', revision, redis.call('HGETALL', KEYS[2]), redis.call('HKEYS', KEYS[3])}
"""
)
"""ARGV: value. Reads the state in order to write it: takes the next revision, so that no write that
is still on its way counts.
"""

WRITE = (
    _UNCHANGED
    + """
for at = 3, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1]) end
return {'ok', redis.call('HINCRBY', KEYS[2], 'revision', 1)}
"""
)
"""ARGV: value, revision, then names and values of fields."""

PUT = (
    _MINE
    + """
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
return {'ok'}
"""
)
"""ARGV: value, name, bytes. A blob is named by its content, so a late one does no harm."""

DROP = (
    _UNCHANGED
    + """
for at = 3, #ARGV do redis.call('HDEL', KEYS[3], ARGV[at]) end
return {'ok'}
"""
)
"""ARGV: value, revision, then names. A late one must not take what was put again meanwhile, hence
the revision.
"""

READ = """
return {'ok', redis.call('HGETALL', KEYS[2])}
"""
"""For anybody."""
