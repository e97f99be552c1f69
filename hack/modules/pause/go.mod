// The program that holds a pod's namespaces open. hack/localcluster builds it into the pause image.
module hotweights.dev/hack/modules/pause

go 1.26.0
