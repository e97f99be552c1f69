-- Goes to all pods without the steps that are left.
-- The command names the revision that it is meant for, and is itself named by the object that was seen.
local annotations = obj.metadata.annotations or {}
annotations["hotweights.dev/command"] = "promote-full " .. ((obj.status or {}).revision or 0) .. " " .. obj.metadata.resourceVersion
obj.metadata.annotations = annotations
return obj
