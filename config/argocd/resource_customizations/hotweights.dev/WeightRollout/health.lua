-- The health of a WeightRollout: its conditions say which, and the operator's own sentence says why.
-- Argo CD gives this Lua 5.1 with the base and table libraries, and a second.
local status = obj.status or {}
if obj.metadata.deletionTimestamp ~= nil then
  return { status = "Progressing", message = "it is being deleted" }
end
-- what is said of an older generation is said of another version; -1 is the status of a new object
if status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "the operator has not seen this change yet" }
end

local holds = {}
for _, condition in ipairs(status.conditions or {}) do
  holds[condition.type] = condition.status == "True"
end

local health = "Progressing"
if holds.Stalled or status.phase == "Aborted" or status.phase == "RolledBack" then
  health = "Degraded" -- also where pods serve on: what Git asks for is not what they serve
elseif holds.Ready then
  health = "Healthy" -- also where it is paused: there is nothing left to wait for
elseif holds.Paused or status.phase == "Paused" then
  health = "Suspended" -- it goes on when somebody says so
end
return { status = health, message = status.message }
