-- Which commands a WeightRollout would follow now. The operator refuses what does not fit by then, in status.lastCommand.
local status = obj.status or {}
local holds = {}
for _, condition in ipairs(status.conditions or {}) do
  holds[condition.type] = condition.status == "True"
end

local seen = (status.revision or 0) > 0 and obj.metadata.deletionTimestamp == nil
local given_up = status.phase == "Aborted" or status.phase == "RolledBack"
local under_way = seen and not holds.Ready and not given_up
local steps = status.canary ~= nil and under_way
local failed = status.pods ~= nil and (status.pods.failed or 0) > 0
local before = status.previous ~= nil and (status.previous.digest or "") ~= ""

local function action(enabled, name, icon)
  return { disabled = not enabled, displayName = name, iconClass = "fa fa-fw " .. icon }
end

local actions = {}
actions["pause"] = action(under_way and not holds.Paused and not holds.Stalled, "Pause", "fa-pause")
actions["resume"] = action(under_way and holds.Paused and not holds.Stalled, "Resume", "fa-play")
actions["promote"] = action(steps, "Promote", "fa-step-forward")
actions["promote-full"] = action(steps, "Promote to all pods", "fa-fast-forward")
actions["abort"] = action(under_way, "Abort", "fa-times-circle")
actions["retry"] = action(seen and (holds.Stalled or given_up), "Retry", "fa-redo")
actions["rollback"] = action(seen and before, "Roll back", "fa-undo")
actions["rollback"].params = { { name = "version" } }
actions["restart-failed"] = action(seen and failed, "Restart failed pods", "fa-sync")
return actions
