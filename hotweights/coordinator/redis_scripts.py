"""What Redis itself decides, in Lua: who leads, and whether a write still counts.

A script runs alone in Redis, so what it compares is true at the moment it writes. Every script that writes state first compares the
lease's value, ``<id>:<fence>``: a leader that was asleep while another took over finds a foreign value and changes nothing. It also
compares the revision, which grows by one with every write: a write whose answer got lost, and that Redis runs late, finds a foreign
revision when its sender has read the state again meanwhile.

Keys are handed in (``KEYS``: the lease, the hash, and blobs where a script takes them); the scripts know no names. The hash's own
fields are ``fence`` (of the last lease given), ``revision`` and ``endpoint`` (of who was given it). Each script answers a list whose
first element says what came of it.
"""

from __future__ import annotations

_MINE = """
local holder = redis.call('GET', KEYS[1])
if holder ~= ARGV[1] then return {'fenced', holder or ''} end
"""

ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder then
  return {'held', holder, redis.call('HGET', KEYS[2], 'endpoint') or '', redis.call('PTTL', KEYS[1])}
end
local last = tonumber(redis.call('HGET', KEYS[2], 'fence') or '0')
local known = tonumber(ARGV[4])
if last < known then redis.call('HSET', KEYS[2], 'fence', ARGV[4]) end
local fence = redis.call('HINCRBY', KEYS[2], 'fence', 1)
redis.call('HSET', KEYS[2], 'endpoint', ARGV[2])
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. string.format('%.0f', fence), 'NX', 'PX', ARGV[3])
return {'acquired', fence, last}
"""
"""ARGV: id, endpoint, lease in milliseconds, the highest fence that the caller ever saw.

The fence that Redis gives is above both its own last one and the caller's, so it grows even when Redis lost its memory."""

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
return {'ok', redis.call('HINCRBY', KEYS[2], 'revision', 1), redis.call('HGETALL', KEYS[2])}
"""
)
"""ARGV: value. Reads the state in order to write it: takes the next revision, so that no write that is still on its way counts."""

WRITE = (
    _MINE
    + """
local revision = redis.call('HGET', KEYS[2], 'revision') or '0'
if revision ~= ARGV[2] then return {'conflict', revision} end
local at, fields, removed = 5, tonumber(ARGV[3]), tonumber(ARGV[4])
for _ = 1, fields do
  redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1])
  at = at + 2
end
for _ = 1, removed do
  redis.call('HDEL', KEYS[2], ARGV[at])
  at = at + 1
end
for key = 3, #KEYS do
  if ARGV[at] == '' then redis.call('DEL', KEYS[key]) else redis.call('SET', KEYS[key], ARGV[at]) end
  at = at + 1
end
return {'ok', redis.call('HINCRBY', KEYS[2], 'revision', 1)}
"""
)
"""ARGV: value, revision, how many fields, how many removed fields, the fields (name, value), the removed ones (name), then a blob
for each further key (empty: delete it)."""

READ = """
return {'ok', redis.call('GET', KEYS[1]) or '', redis.call('HGETALL', KEYS[2])}
"""
"""For anybody: who leads and the state, as of one moment."""
