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
{{- if and .Values.objectStorage.enabled (contains "\"/shared" .Values.config) }}
{{- fail "config has a path below /shared, and with objectStorage.enabled there is no shared volume; write s3://BUCKET/PREFIX" }}
{{- end -}}
{{ .Values.config | trimSuffix "\n" }}

[cluster]
stages = {{ .Values.cluster.stages }}
replicas = {{ .Values.cluster.replicas }}
shards = {{ .Values.cluster.shards }}
{{- with .Values.cluster.replicasMax }}
replicas_max = {{ . }}
{{- end }}
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

{{- /* The pod that fills the Secrets, of the Job and of the CronJob. */}}
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
      {{- $only := eq .Values.certificates "cert-manager" | ternary (list "--join-secret-only") list }}
      args: {{ concat (list "shardlane.cli" "certs" "--kubernetes-secrets" (include "shardlane.name" .)) $only | toJson }}
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
{{- $together := not (or $.Values.storage.shared.manyNodes $.Values.objectStorage.enabled) }}
{{- if or $together (eq (index . 1) "shard") }}
affinity:
  {{- if $together }}
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
- name: SHARDLANE_JOIN_SECRET_FILE
  value: /join/join.secret
{{- end }}

{{- /* The store's own variables, for every process: endpoint, region, credentials. */}}
{{- define "shardlane.storeSecret" -}}
{{- if and .Values.objectStorage.enabled .Values.objectStorage.secret }}
envFrom:
  - secretRef:
      name: {{ .Values.objectStorage.secret }}
{{- end }}
{{- end }}

{{- define "shardlane.storeEnvironment" -}}
{{- if .Values.objectStorage.enabled }}
{{- range $name, $value := .Values.objectStorage.environment }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /* There is no home for it; members get the config from the coordinator. */}}
{{- define "shardlane.dataCache" -}}
{{- if .Values.objectStorage.enabled }}
- name: SHARDLANE_DATA__CACHE
  value: /tmp/data
{{- end }}
{{- end }}

{{- define "shardlane.secretMounts" -}}
- name: certs
  mountPath: /certs
  readOnly: true
- name: join
  mountPath: /join
  readOnly: true
{{- end }}

{{- /* (list $ component): a pod waits until all keys are there. */}}
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
- name: join
  secret:
    secretName: {{ include "shardlane.name" (index . 0) }}-join
    defaultMode: 0440
    items:
      - key: join.secret
        path: join.secret
- name: tmp
  emptyDir: {}
{{- if not (index . 0).Values.objectStorage.enabled }}
- name: shared
  persistentVolumeClaim:
    claimName: {{ include "shardlane.name" (index . 0) }}-shared
{{- end }}
{{- end }}
