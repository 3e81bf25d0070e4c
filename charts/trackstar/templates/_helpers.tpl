{{/* Names, labels, images, security and the parts that all pods share. */}}

{{- define "trackstar.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* 38: KubeRay takes no names of RayServices and RayJobs above 47 characters. */}}
{{- define "trackstar.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 38 | trimSuffix "-" -}}
{{- else if contains (include "trackstar.name" .) .Release.Name -}}
{{- .Release.Name | trunc 38 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "trackstar.name" .) | trunc 38 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select pods: (list $ component) */}}
{{- define "trackstar.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "trackstar.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "trackstar.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | quote }}
{{ include "trackstar.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: trackstar
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* (list $ images-entry) */}}
{{- define "trackstar.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "trackstar.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "trackstar.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* A ServiceAccount's name: (list $ component) */}}
{{- define "trackstar.account" -}}
{{ include "trackstar.fullname" (index . 0) }}-{{ index . 1 }}
{{- end -}}

{{/* What every container finds in its environment. */}}
{{- define "trackstar.environment" -}}
- {name: HOME, value: /tmp}
- {name: PYTHONUNBUFFERED, value: "1"}
{{- range $name, $value := .Values.objectStore.environment }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{- define "trackstar.environmentFrom" -}}
{{- with .Values.objectStore.secret }}
- secretRef: {name: {{ . }}}
{{- end }}
{{- end -}}

{{/* Mounts and volumes of index and checkpoint: (list $ write) */}}
{{- define "trackstar.dataMounts" -}}
{{- $root := index . 0 -}}
- {name: tmp, mountPath: /tmp}
{{- if or $root.Values.index.claim $root.Values.demo.enabled }}
- {name: index, mountPath: {{ $root.Values.index.mountPath }}, readOnly: {{ not (index . 1) }}}
{{- end }}
{{- if $root.Values.checkpoint.claim }}
- {name: checkpoint, mountPath: {{ $root.Values.checkpoint.mountPath }}, readOnly: true}
{{- end }}
{{- end -}}

{{- define "trackstar.dataVolumes" -}}
{{- $root := index . 0 -}}
- {name: tmp, emptyDir: {}}
{{- if $root.Values.index.claim }}
- {name: index, persistentVolumeClaim: {claimName: {{ $root.Values.index.claim }}}}
{{- else if $root.Values.demo.enabled }}
- {name: index, emptyDir: {}}
{{- end }}
{{- if $root.Values.checkpoint.claim }}
- {name: checkpoint, persistentVolumeClaim: {claimName: {{ $root.Values.checkpoint.claim }}, readOnly: true}}
{{- end }}
{{- end -}}

{{- define "trackstar.milvusMounts" -}}
{{- if .Values.milvus.tokenSecret }}
- {name: milvus-token, mountPath: /etc/trackstar/milvus, readOnly: true}
{{- end }}
{{- if .Values.milvus.caSecret }}
- {name: milvus-ca, mountPath: /etc/trackstar/milvus-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "trackstar.milvusVolumes" -}}
{{- with .Values.milvus.tokenSecret }}
- {name: milvus-token, secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: token, path: token}]}}
{{- end }}
{{- with .Values.milvus.caSecret }}
- {name: milvus-ca, secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}}
{{- end }}
{{- end -}}

{{/* The section `milvus` of gateway, job and audit settings, as a dictionary in YAML. */}}
{{- define "trackstar.milvusSettings" -}}
{{- with .Values.milvus -}}
address: {{ .address }}
{{- if .database }}
database: {{ .database }}
{{- end }}
collection_prefix: {{ .collectionPrefix }}
tls: {{ .tls }}
{{- if .tokenSecret }}
token_file: /etc/trackstar/milvus/token
{{- end }}
{{- if .caSecret }}
ca_file: /etc/trackstar/milvus-ca/ca.crt
{{- end }}
{{- end -}}
{{- end -}}

{{/* Pods of a component apart from each other: (list $ component) */}}
{{- define "trackstar.spread" -}}
- maxSkew: 1
  topologyKey: topology.kubernetes.io/zone
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "trackstar.selector" . | nindent 6 }}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "trackstar.selector" . | nindent 6 }}
{{- end -}}

{{- define "trackstar.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* nodeSelector, tolerations and priorityClassName of a pod. */}}
{{- define "trackstar.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "trackstar.distributed" -}}
{{- if eq .Values.mode "distributed" }}true{{ end -}}
{{- end -}}
