{{/* Parts of network policies. */}}

{{- define "trackstar.policyHead" -}}
{{- $root := index . 0 -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "trackstar.fullname" $root }}-{{ index . 2 }}
  labels: {{- include "trackstar.labels" (list $root (index . 1)) | nindent 4 }}
spec:
  podSelector:
    matchLabels: {{- include "trackstar.selector" (list $root (index . 1)) | nindent 6 }}
{{- end -}}

{{- define "trackstar.egressCommon" -}}
- to: {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- with .Values.networkPolicy.egress }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "trackstar.rayPolicyPorts" -}}
- {port: 6379, endPort: 6383, protocol: TCP}
- {port: 8265, protocol: TCP}
- {port: 10001, protocol: TCP}
- {port: 10100, endPort: 10999, protocol: TCP}
- {port: 52365, protocol: TCP}
- {port: 8080, protocol: TCP}
- {port: 8000, protocol: TCP}
- {port: 9000, protocol: TCP}
{{- end -}}
