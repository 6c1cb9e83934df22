"""The Pod Security Standard `restricted`, as its page lists it: what admission refuses in a pod."""

from __future__ import annotations

from typing import Any

from tests.deploy.renderings import Object, containers

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SECCOMP = {"RuntimeDefault", "Localhost"}
SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start", "net.ipv4.tcp_syncookies"),
    *("net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports", "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout"),
    *("net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes"),
}
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def faults(pod: Object, annotations: Object) -> list[str]:
    """A line for each thing that breaks the profile; `pod` is a PodSpec."""
    shared = pod.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [f"volume {each['name']}" for each in pod.get("volumes", ()) if not each.keys() - {"name"} <= VOLUMES]
    found += [f"sysctl {each['name']}" for each in shared.get("sysctls", ()) if each["name"] not in SYSCTLS]
    found += [f"annotation {name}" for name in annotations if name.startswith("container.apparmor.security.beta")]
    for container in [*containers(pod), *pod.get("ephemeralContainers", ())]:
        found += [f"{container['name']}: {fault}" for fault in _container_faults(container, shared)]
    return found


def _container_faults(container: Object, shared: Object) -> list[str]:
    own = container.get("securityContext", {})

    def effective(key: str, default: Any = None) -> Any:
        return own.get(key, shared.get(key, default))

    capabilities, selinux = own.get("capabilities", {}), effective("seLinuxOptions", {})
    probes = [container[name] for name in ("livenessProbe", "readinessProbe", "startupProbe") if name in container]
    probes += container.get("lifecycle", {}).values()
    checks = {
        "privileged": own.get("privileged", False) is False,
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "runAsNonRoot": effective("runAsNonRoot") is True,
        "runAsUser": effective("runAsUser", 1) != 0,
        "seccompProfile": effective("seccompProfile", {}).get("type") in SECCOMP,
        "drop ALL": "ALL" in capabilities.get("drop", ()),
        "capabilities": set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"},
        "hostPort": not any(port.get("hostPort") for port in container.get("ports", ())),
        "procMount": own.get("procMount", "Default") == "Default",
        "appArmorProfile": effective("appArmorProfile", {"type": "RuntimeDefault"})["type"] in SECCOMP,
        "seLinuxOptions": selinux.get("type", "") in SELINUX and not selinux.keys() & {"user", "role"},
        "windowsOptions": not effective("windowsOptions", {}).get("hostProcess"),
        "host of a probe": not any(each.get(how, {}).get("host") for each in probes for how in ("httpGet", "tcpSocket")),
    }
    return [name for name, is_met in checks.items() if not is_met]
