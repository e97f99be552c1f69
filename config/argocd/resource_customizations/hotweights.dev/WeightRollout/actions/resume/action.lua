-- Ends a pause that was commanded. One of Git (spec.paused) ends in Git.
-- The command names the revision that it is meant for, and is itself named by the object that was seen.
local annotations = obj.metadata.annotations or {}
annotations["hotweights.dev/command"] = "resume " .. ((obj.status or {}).revision or 0) .. " " .. obj.metadata.resourceVersion
obj.metadata.annotations = annotations
return obj
