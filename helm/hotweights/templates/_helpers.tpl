{{/* Prefix of every name: the release's, with "hotweights" in it. */}}
{{- define "hotweights.fullname" -}}
{{- if contains "hotweights" .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-hotweights" (.Release.Name | trunc 29 | trimSuffix "-") }}
{{- end -}}
{{- end -}}

{{/* Labels that select a component's pods. Takes [root, component]. */}}
{{- define "hotweights.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: hotweights
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Labels of every object. Takes [root, component]. */}}
{{- define "hotweights.labels" -}}
{{- $root := index . 0 -}}
{{ include "hotweights.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The image's full name: operator and agent are one image. */}}
{{- define "hotweights.image" -}}
{{- with .Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* Scheduling and pull secrets of a pod template. Takes [root, the component's values]. */}}
{{- define "hotweights.placement" -}}
{{- $root := index . 0 -}}
{{- $values := index . 1 -}}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* An environment variable from a field of the pod. Takes [name, path]. */}}
{{- define "hotweights.fieldEnv" -}}
- name: {{ index . 0 }}
  valueFrom: {fieldRef: {fieldPath: {{ index . 1 }}}}
{{- end -}}

{{/* Where an agent sees a source root: at its path, or under /pvc. */}}
{{- define "hotweights.sourceMount" -}}
{{ .path | default (printf "/pvc/%s" .persistentVolumeClaim) }}
{{- end -}}

{{/* The agents' settings but for the sources: the transports, and agent.settings, which has the last word. YAML of a mapping. */}}
{{- define "hotweights.agentSettings" -}}
{{- $settings := dict -}}
{{- with .Values.agent.transports -}}
{{- if .ucx }}{{ $_ := set $settings "ucx_port" 7601 }}{{ end -}}
{{- if .mpi }}{{ $_ := set $settings "mpi" true }}{{ end -}}
{{- end -}}
{{- with .Values.namespaces }}{{ $_ := set $settings "kube" (dict "namespaces" .) }}{{ end -}}
{{ toYaml (mergeOverwrite $settings (.Values.agent.settings | default dict | deepCopy)) }}
{{- end -}}

{{/* Rights in the namespaces that are served: in all of them by one ClusterRole, in those that are named by a Role in each. The
rules of the cluster's own objects are in the ClusterRole either way. Takes [root, component, rules, rules of the cluster]. */}}
{{- define "hotweights.served" -}}
{{- $root := index . 0 -}}
{{- $labels := include "hotweights.labels" (list $root (index . 1)) | fromYaml -}}
{{- $name := printf "%s-%s" (include "hotweights.fullname" $root) (index . 1) -}}
{{- $account := dict "kind" "ServiceAccount" "name" $name "namespace" $root.Release.Namespace -}}
{{- $group := "rbac.authorization.k8s.io" -}}
{{- $rules := fromYamlArray (index . 2) -}}
{{- $everywhere := fromYamlArray (index . 3) -}}
{{- if not $root.Values.namespaces }}{{ $everywhere = concat $everywhere $rules }}{{ end -}}
{{- $meta := dict "name" $name "labels" $labels -}}
---
{{ toYaml (dict "apiVersion" (print $group "/v1") "kind" "ClusterRole" "metadata" $meta "rules" $everywhere) }}
---
{{ toYaml (dict "apiVersion" (print $group "/v1") "kind" "ClusterRoleBinding" "metadata" $meta "subjects" (list $account)
  "roleRef" (dict "apiGroup" $group "kind" "ClusterRole" "name" $name)) }}
{{- range $root.Values.namespaces }}
{{- $meta := dict "name" (print $name "-served") "namespace" . "labels" $labels }}
---
{{ toYaml (dict "apiVersion" (print $group "/v1") "kind" "Role" "metadata" $meta "rules" $rules) }}
---
{{ toYaml (dict "apiVersion" (print $group "/v1") "kind" "RoleBinding" "metadata" $meta "subjects" (list $account)
  "roleRef" (dict "apiGroup" $group "kind" "Role" "name" (print $name "-served"))) }}
{{- end }}
{{- end -}}

{{/* Which namespaces' pods the label opts in: a line of matchConstraints, or none. */}}
{{- define "hotweights.servedSelector" -}}
{{- with .Values.namespaces }}
namespaceSelector:
  matchExpressions:
    - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson . }}}
{{- end }}
{{- end -}}

{{/* The agents' user name, as the API server knows it. */}}
{{- define "hotweights.agentUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "hotweights.fullname" . }}-agent
{{- end -}}

{{/* The containers of a pod that run the engine, in CEL: the one that the annotation names, else what was injected already (others
may add sidecars after us, and then we are asked again), else the only one, else what starts vLLM. Only one of them is an answer. */}}
{{- define "hotweights.engines" -}}
object.spec.containers.filter(c,
  object.metadata.?annotations[?'hotweights.dev/container'].hasValue()
    ? c.name == object.metadata.annotations['hotweights.dev/container']
  : object.spec.containers.exists(o, o.?env.orValue([]).exists(e, e.name == 'HOTWEIGHTS_SOCKET'))
    ? c.?env.orValue([]).exists(e, e.name == 'HOTWEIGHTS_SOCKET')
  : size(object.spec.containers) == 1 || (c.?command.orValue([]) + c.?args.orValue([])).join(' ').matches(
    '(^|[\\s/])vllm\\s+serve(\\s|$)|(^|\\s)-m\\s*vllm[.]entrypoints[.]'))
{{- end -}}
