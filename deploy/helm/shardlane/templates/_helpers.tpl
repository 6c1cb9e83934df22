{{- define "shardlane.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "shardlane.selector" -}}
app.kubernetes.io/name: shardlane
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "shardlane.labels" -}}
{{ include "shardlane.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "shardlane.config" -}}
{{- if regexMatch "(?m)^\\s*\\[\\s*cluster" .Values.config }}
{{- fail "config has a [cluster], which the value `cluster` says; take it out" }}
{{- end -}}
{{ .Values.config | trimSuffix "\n" }}

[cluster]
stages = {{ .Values.cluster.stages }}
replicas = {{ .Values.cluster.replicas }}
shards = {{ .Values.cluster.shards }}
{{ end }}

{{- define "shardlane.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "shardlane.container" -}}
image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{- define "shardlane.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The pod that fills the Secrets with certificates, of the Job and of the CronJob. */}}
{{- define "shardlane.certificates" -}}
metadata:
  labels:
    {{- include "shardlane.selector" . | nindent 4 }}
    app.kubernetes.io/component: certificates
spec:
  serviceAccountName: {{ include "shardlane.name" . }}-certificates
  automountServiceAccountToken: true
  enableServiceLinks: false
  restartPolicy: OnFailure
  {{- include "shardlane.pullSecrets" . | nindent 2 }}
  securityContext:
    {{- include "shardlane.podSecurity" . | nindent 4 }}
  containers:
    - name: certificates
      {{- include "shardlane.container" . | nindent 6 }}
      args: [shardlane.cli, certs, --kubernetes-secrets, {{ include "shardlane.name" . }}]
      resources:
        requests:
          cpu: 100m
          memory: 128Mi
        limits:
          memory: 256Mi
{{- end }}

{{- /* A headless Service; (list $ component name). Who leaves, or is not ready yet, is spoken to all the same. */}}
{{- define "shardlane.service" -}}
{{- $ := index . 0 -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ index . 2 }}
  namespace: {{ $.Release.Namespace }}
  labels:
    {{- include "shardlane.labels" $ | nindent 4 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    {{- include "shardlane.selector" $ | nindent 4 }}
    app.kubernetes.io/component: {{ index . 1 }}
  ports:
    - name: grpc
      port: 7070
      appProtocol: grpc
    - name: metrics
      port: 9100
{{- end }}

{{- /* What the pods of all services have in common; (list $ component graceSeconds settings). */}}
{{- define "shardlane.pod" -}}
{{- $ := index . 0 -}}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ index . 2 }}
{{- include "shardlane.pullSecrets" $ }}
{{- with (index . 3).nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or (not $.Values.storage.shared.manyNodes) (eq (index . 1) "shard") }}
affinity:
  {{- if not $.Values.storage.shared.manyNodes }}
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "shardlane.selector" $ | nindent 12 }}
          matchExpressions:
            - key: app.kubernetes.io/component
              operator: In
              values: [coordinator, shard, worker]
  {{- end }}
  {{- if eq (index . 1) "shard" }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "shardlane.selector" $ | nindent 14 }}
              app.kubernetes.io/component: shard
  {{- end }}
{{- end }}
securityContext:
  {{- include "shardlane.podSecurity" $ | nindent 2 }}
  fsGroupChangePolicy: OnRootMismatch
{{- end }}

{{- /* (list $ startupFailures) */}}
{{- define "shardlane.serving" -}}
ports:
  - name: grpc
    containerPort: 7070
  - name: metrics
    containerPort: 9100
startupProbe:
  httpGet:
    path: /healthz
    port: metrics
  periodSeconds: 5
  failureThreshold: {{ index . 1 }}
readinessProbe:
  httpGet:
    path: /healthz
    port: metrics
  periodSeconds: 5
livenessProbe:
  httpGet:
    path: /healthz
    port: metrics
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{- define "shardlane.tls" -}}
- name: SHARDLANE_SSL_CA_CERTFILE
  value: /certs/ca.crt
- name: SHARDLANE_SSL_CERTFILE
  value: /certs/tls.crt
- name: SHARDLANE_SSL_KEYFILE
  value: /certs/tls.key
{{- end }}

{{- /* (list $ component): a pod waits until all three keys are there. */}}
{{- define "shardlane.volumes" -}}
- name: certs
  secret:
    secretName: {{ include "shardlane.name" (index . 0) }}-{{ index . 1 }}-tls
    defaultMode: 0440
    items:
      - key: ca.crt
        path: ca.crt
      - key: tls.crt
        path: tls.crt
      - key: tls.key
        path: tls.key
- name: tmp
  emptyDir: {}
- name: shared
  persistentVolumeClaim:
    claimName: {{ include "shardlane.name" (index . 0) }}-shared
{{- end }}
