{{- define "trackstar.rules" -}}
groups: []
{{- end -}}
