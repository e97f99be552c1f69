-- The health of a WeightVersion: whether its source was read, and rollouts can use it.
-- Argo CD gives this Lua 5.1 with the base and table libraries, and a second.
local status = obj.status or {}
if obj.metadata.deletionTimestamp ~= nil then
  return { status = "Progressing", message = "it is being deleted" }
end
if status.observedGeneration ~= obj.metadata.generation then
  return { status = "Progressing", message = "the operator has not seen this version yet" }
end

local health, message = "Progressing", nil
for _, condition in ipairs(status.conditions or {}) do
  if condition.type == "Ready" then
    message = condition.message
    if condition.status == "True" then
      health = "Healthy"
    end
  elseif condition.type == "Stalled" and condition.status == "True" then
    health = "Degraded"
  end
end
return { status = health, message = message }
