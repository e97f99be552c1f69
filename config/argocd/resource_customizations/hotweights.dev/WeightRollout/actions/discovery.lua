-- Which commands a WeightRollout would follow now. The operator refuses what does not fit by then, in status.lastCommand.
local status = obj.status or {}
local canary = status.canary or {}
local holds = {}
for _, condition in ipairs(status.conditions or {}) do
  holds[condition.type] = condition.status == "True"
end

local function named(field)
  return field ~= nil and field ~= ""
end

local seen = (status.revision or 0) > 0 and obj.metadata.deletionTimestamp == nil
local given_up = status.phase == "Aborted" or status.phase == "RolledBack"
local under_way = seen and not holds.Ready and not given_up
local steps = under_way and (canary.step or 0) < (canary.steps or 0)
local waits = canary.waitsFor == "Promotion" or canary.waitsFor == "Time"
local commanded = named(status.pausedBy) -- a pause of Git's ends in Git
local back = named((status.rolledBack or {}).by)
local failed = ((status.pods or {}).failed or 0) > 0

local function action(enabled, name, icon)
  return { disabled = not enabled, displayName = name, iconClass = "fa fa-fw " .. icon }
end

local actions = {}
actions["pause"] = action(under_way and not holds.Stalled and not commanded and not obj.spec.paused, "Pause", "fa-pause")
actions["resume"] = action(under_way and commanded, "Resume", "fa-play")
actions["promote"] = action(steps and waits, "Promote", "fa-step-forward")
actions["promote-full"] = action(steps, "Promote to all pods", "fa-fast-forward")
actions["abort"] = action(under_way, "Abort", "fa-times-circle")
actions["retry"] = action(seen and (holds.Stalled or given_up), "Retry", "fa-redo")
actions["rollback"] = action(seen and not back and named((status.previous or {}).digest), "Roll back", "fa-undo")
actions["rollback"].params = { { name = "version" } }
actions["restart-failed"] = action(seen and failed, "Retry failed pods", "fa-sync")
return actions
