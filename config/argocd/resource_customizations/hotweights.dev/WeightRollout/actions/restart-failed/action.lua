-- Has the pods that failed to follow try once more, as a new revision.
-- The command names the revision that it is meant for, and is itself named by the object that was seen.
local annotations = obj.metadata.annotations or {}
annotations["hotweights.dev/command"] = "restart-failed " .. ((obj.status or {}).revision or 0) .. " " .. obj.metadata.resourceVersion
obj.metadata.annotations = annotations
return obj
