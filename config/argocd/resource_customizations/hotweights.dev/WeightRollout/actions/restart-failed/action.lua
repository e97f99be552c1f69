-- Ends the containers of the pods that failed to follow, so that they boot into what they are told.
-- The command names the revision that it is meant for, and is itself named by the object that was seen.
local annotations = obj.metadata.annotations or {}
annotations["hotweights.dev/command"] = "restart-failed " .. ((obj.status or {}).revision or 0) .. " " .. obj.metadata.resourceVersion
obj.metadata.annotations = annotations
return obj
