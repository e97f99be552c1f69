-- Goes back to what was complete before, or to the WeightVersion that the parameter `version` names. Git is left as it is:
-- set spec.versionRef back there too.
-- The command names the revision that it is meant for, and is itself named by the object that was seen.
local verb = "rollback"
if actionParams ~= nil and actionParams.version ~= nil and actionParams.version ~= "" then
  verb = verb .. "@" .. actionParams.version
end
local annotations = obj.metadata.annotations or {}
annotations["hotweights.dev/command"] = verb .. " " .. ((obj.status or {}).revision or 0) .. " " .. obj.metadata.resourceVersion
obj.metadata.annotations = annotations
return obj
