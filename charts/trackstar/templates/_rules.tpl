{{/*
Spec of the PrometheusRule. Its parts are plain files of Prometheus below rules/, so that Prometheus' own {{ }} stays what
it is there; in them ${name} stands for what is put in here.
*/}}

{{- define "trackstar.rules" -}}
{{- $objectives := .Values.monitoring.objectives -}}
{{- $names := dict
  "release" (include "trackstar.fullname" .)
  "namespace" .Release.Namespace
  "gateway" (printf `namespace="%s",job="%s-gateway-headless"` .Release.Namespace (include "trackstar.fullname" .))
  "runbooks" (trimSuffix "/" .Values.monitoring.runbooks)
  "availability" $objectives.availability
  "latency" $objectives.latency
  "latencySeconds" $objectives.latencySeconds
  "latencyBucket" (include "trackstar.latencyBucket" .)
  "recall" $objectives.recall
  "milvusMemoryBytes" (int64 $objectives.milvusMemoryBytes)
-}}
groups:
  - name: trackstar.objectives
    interval: 30s
    rules:
      {{- range $window := list "5m" "30m" "1h" "2h" "6h" "1d" "3d" }}
      {{- include "trackstar.rulesFile" (list $ "objectives" $names (dict "window" $window)) | nindent 6 }}
      {{- end }}
  - name: trackstar.budgets
    rules:
      {{- range $pair := include "trackstar.burnRates" . | fromYamlArray }}
      {{- include "trackstar.rulesFile" (list $ "budgets" $names $pair) | nindent 6 }}
      {{- end }}
  - name: trackstar.service
    rules:
      {{- include "trackstar.rulesFile" (list . "service" $names dict) | nindent 6 }}
  {{- if $objectives.milvusMemoryBytes }}
  - name: trackstar.milvus
    rules:
      {{- include "trackstar.rulesFile" (list . "milvus" $names dict) | nindent 6 }}
  {{- end }}
{{- end -}}

{{/*
How fast a budget may burn before it is told: over a long window and, so that the alert ends soon after its cause, over a
short one. A budget is that of 30 days: at 14.4 times the allowed rate an hour costs 2 % of it, at 6 times six hours cost
5 %, at 3 times a day costs 10 %, at 1 three days do (The Site Reliability Workbook, chapter 5).
*/}}
{{- define "trackstar.burnRates" -}}
- {factor: "14.4", long: 1h, short: 5m, for: 2m, severity: critical}
- {factor: "6", long: 6h, short: 30m, for: 15m, severity: critical}
- {factor: "3", long: 1d, short: 2h, for: 1h, severity: warning}
- {factor: "1", long: 3d, short: 6h, for: 3h, severity: warning}
{{- end -}}

{{/* The bucket of trackstar_rpc_duration_seconds that ends at latencySeconds, as Prometheus writes it. */}}
{{- define "trackstar.latencyBucket" -}}
{{- $seconds := .Values.monitoring.objectives.latencySeconds -}}
{{- $buckets := list "0.001" "0.0025" "0.005" "0.01" "0.025" "0.05" "0.1" "0.25" "0.5" "1.0" "2.5" "5.0" "10.0" "30.0" "60.0" "120.0" "300.0" "600.0" -}}
{{- $found := "" -}}
{{- range $buckets -}}
{{- if eq (float64 .) (float64 $seconds) -}}{{- $found = . -}}{{- end -}}
{{- end -}}
{{- if not $found -}}
{{- fail (printf "monitoring.objectives.latencySeconds is %v, and times are only counted in buckets; take one of %s" $seconds (join ", " $buckets)) -}}
{{- end -}}
{{- $found -}}
{{- end -}}

{{/* A file below rules/ with its names put in, without the comments of its own: (list $ file names more-names) */}}
{{- define "trackstar.rulesFile" -}}
{{- $text := (index . 0).Files.Get (printf "rules/%s.yaml" (index . 1)) -}}
{{- range $name, $value := merge (dict) (index . 2) (index . 3) -}}
{{- $text = replace (printf "${%s}" $name) (toString $value) $text -}}
{{- end -}}
{{- regexReplaceAll "(?m)^#.*\\n" $text "" | trim -}}
{{- end -}}
