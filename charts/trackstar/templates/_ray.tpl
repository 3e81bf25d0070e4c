{{/* Pods of Ray clusters. Ports are fixed, so that network policies can name them. */}}

{{- define "trackstar.rayPorts" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "10100"
max-worker-port: "10999"
disable-usage-stats: "true"
{{- /* Ray would take 30% of the memory, and put it on disk where /dev/shm has less. */}}
object-store-memory: {{ include "trackstar.bytes" .Values.ray.sharedMemory | float64 | mulf 0.95 | floor | int64 | quote }}
{{- end -}}

{{/* Bytes of a quantity, such as 2Gi. */}}
{{- define "trackstar.bytes" -}}
{{- $units := dict "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := toString . | regexFind "[kmMGT]i?$" -}}
{{- toString . | trimSuffix $unit | float64 | mulf (get $units $unit | default 1 | float64) | floor | int64 -}}
{{- end -}}

{{/* Spec of a pod: (dict "root" $ "component" serve|reindex "kind" head|worker "group" values "autoscaling" bool) */}}
{{- define "trackstar.rayPod" -}}
{{- $root := .root -}}
metadata:
  labels: {{- include "trackstar.labels" (list $root .component) | nindent 4 }}
spec:
  {{- /* A head with the autoscaler gets an account of the operator's, with the rights to scale its own cluster. */}}
  {{- if not (and (eq .kind "head") .autoscaling) }}
  serviceAccountName: {{ include "trackstar.account" (list $root "ray") }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  {{- include "trackstar.pullSecrets" $root | nindent 2 }}
  securityContext: {{- include "trackstar.podSecurity" $root | nindent 4 }}
  terminationGracePeriodSeconds: 60
  topologySpreadConstraints: {{- include "trackstar.spread" (list $root .component) | nindent 4 }}
  {{- include "trackstar.placement" .group | nindent 2 }}
  containers:
    - name: ray-{{ .kind }}
      image: {{ include "trackstar.image" (list $root $root.Values.images.ray) }}
      imagePullPolicy: {{ $root.Values.images.ray.pullPolicy }}
      env:
        {{- include "trackstar.environment" $root | nindent 8 }}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
      {{- with include "trackstar.environmentFrom" $root }}
      envFrom: {{- . | nindent 8 }}
      {{- end }}
      ports:
        {{- if eq .kind "head" }}
        - {name: gcs, containerPort: 6379, protocol: TCP}
        - {name: dashboard, containerPort: 8265, protocol: TCP}
        {{- end }}
        {{- if eq .component "serve" }}
        - {name: serve, containerPort: 8000, protocol: TCP}
        - {name: serve-grpc, containerPort: 9000, protocol: TCP}
        {{- end }}
        - {name: agent, containerPort: 52365, protocol: TCP}
        - {name: metrics, containerPort: 8080, protocol: TCP}
      {{- if eq .kind "head" }}
      livenessProbe:
        httpGet: {path: /api/gcs_healthz, port: 8265}
        initialDelaySeconds: 30
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      readinessProbe:
        httpGet: {path: /api/gcs_healthz, port: 8265}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 10
      {{- else }}
      livenessProbe:
        httpGet: {path: /api/local_raylet_healthz, port: 52365}
        initialDelaySeconds: 30
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      # Serve's gRPC proxy has no health service; the HTTP proxy beside it tells for both.
      readinessProbe:
        httpGet:
          {{- if eq .component "serve" }}
          path: /-/healthz
          port: 8000
          {{- else }}
          path: /api/local_raylet_healthz
          port: 52365
          {{- end }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 2
      {{- end }}
      securityContext: {{- include "trackstar.containerSecurity" $root | nindent 8 }}
      resources: {{- toYaml .group.resources | nindent 8 }}
      volumeMounts:
        {{- /* Jobs that come through the gateway run where encoders serve, and write. */}}
        {{- include "trackstar.dataMounts" (list $root (or (eq .component "reindex") $root.Values.reindex.throughGateway.enabled)) | nindent 8 }}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if eq .component "reindex" }}
        - {name: job, mountPath: /etc/trackstar/job, readOnly: true}
        {{- end }}
        {{- include "trackstar.milvusMounts" $root | nindent 8 }}
  volumes:
    {{- include "trackstar.dataVolumes" (list $root true) | nindent 4 }}
    - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ $root.Values.ray.sharedMemory }}}}
    {{- if eq .component "reindex" }}
    - {name: job, configMap: {name: {{ include "trackstar.fullname" $root }}-reindex}}
    {{- end }}
    {{- include "trackstar.milvusVolumes" $root | nindent 4 }}
{{- end -}}

{{/* A Ray cluster's spec: (dict "root" $ "component" name "head" group "workers" groups "autoscaling" bool) */}}
{{- define "trackstar.rayCluster" -}}
{{- $root := .root -}}
{{- $component := .component -}}
{{- $autoscaling := .autoscaling -}}
rayVersion: {{ $root.Values.ray.version | quote }}
authOptions: {mode: token, secretName: {{ $root.Values.ray.tokenSecret }}}
enableInTreeAutoscaling: {{ $autoscaling }}
{{- if $autoscaling }}
autoscalerOptions:
  version: v2
  upscalingMode: Default
  idleTimeoutSeconds: 300
  resources:
    requests: {cpu: 200m, memory: 512Mi}
    limits: {memory: 1Gi}
  securityContext: {{- include "trackstar.containerSecurity" $root | nindent 4 }}
  env:
    - {name: HOME, value: /tmp}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
{{- end }}
headGroupSpec:
  rayStartParams:
    dashboard-host: 0.0.0.0
    num-cpus: "0"
    {{- include "trackstar.rayPorts" $root | nindent 4 }}
  template: {{- include "trackstar.rayPod" (dict "root" $root "component" $component "kind" "head" "group" .head "autoscaling" $autoscaling) | nindent 4 }}
workerGroupSpecs:
  {{- range .workers }}
  - groupName: {{ .name }}
    replicas: {{ ternary .minReplicas .maxReplicas $autoscaling }}
    minReplicas: {{ .minReplicas }}
    maxReplicas: {{ .maxReplicas }}
    rayStartParams: {{- include "trackstar.rayPorts" $root | nindent 6 }}
    template: {{- include "trackstar.rayPod" (dict "root" $root "component" $component "kind" "worker" "group" . "autoscaling" $autoscaling) | nindent 6 }}
  {{- end }}
{{- end -}}
