"""NetworkPolicies let through what the code's own tables of callers allow, and nothing else."""

from __future__ import annotations

import pytest

from coordinator.service import CALLERS as OF_COORDINATOR
from ps_service.peers import CALLERS as OF_SHARD
from shardlane.tls import ROLES
from tests.deploy.renderings import (
    COMPONENT,
    MEMBERS,
    RENDERINGS,
    STORE,
    Object,
    members,
    of_kind,
    pod_templates,
    rendering,
    selects,
)
from tests.deploy.test_manifests import GRPC_PORT, METRICS_PORT
from worker_service.service import CALLERS as OF_WORKER

CALLERS = {"coordinator": OF_COORDINATOR, "shard": OF_SHARD, "worker": OF_WORKER}


@pytest.fixture(scope="module", params=[name for name in RENDERINGS if name != "chart, least of it"])
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return rendering(request.param)


def labels_of(objects: tuple[Object, ...]) -> dict[str, dict[str, str]]:
    found = {role: each["spec"]["template"]["metadata"]["labels"] for role, each in members(objects).items()}
    return found | {"operator": found["worker"] | {COMPONENT: "operator"}}


def opened(
    objects: tuple[Object, ...], direction: str, of: dict[str, str], to: dict[str, str] | None, namespace: str = ""
) -> set[int]:
    """TCP ports that policies open for pods with labels `of`, from or towards pods with labels `to`, or of another namespace."""
    ports: set[int] = set()
    isolated = False
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        if direction.title() not in spec["policyTypes"] or not selects(spec["podSelector"], of):
            continue
        isolated = True
        for rule in spec.get(direction, ()):
            peers = rule.get("from" if direction == "ingress" else "to")
            if peers is None or any(meets(peer, to, namespace) for peer in peers):
                ports |= {each["port"] for each in rule["ports"] if each.get("protocol", "TCP") == "TCP"}
    assert isolated, "without a policy every port is open"
    return ports


def meets(peer: Object, labels: dict[str, str] | None, namespace: str) -> bool:
    """A peer without a namespaceSelector is in the policy's own namespace."""
    if "namespaceSelector" in peer:
        return bool(namespace) and selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    return labels is not None and not namespace and selects(peer["podSelector"], labels)


def test_who_may_call_may_connect_and_nobody_else(objects: tuple[Object, ...]) -> None:
    labels = labels_of(objects)
    wanted = {(caller, role) for role in MEMBERS for allowed in CALLERS[role].values() for caller in allowed if caller in ROLES}
    wanted |= {("coordinator", role) for role in ("shard", "worker")}  # it tries the ports of whom it has lost sight of
    for source in labels:
        for target in MEMBERS:
            may = {(source, target)} <= wanted
            into = opened(objects, "ingress", labels[target], labels[source])
            out = opened(objects, "egress", labels[source], labels[target]) - {53, *to_store(objects)}
            assert into == out == ({GRPC_PORT} if may else set()), (source, target)
    assert len(wanted) == 8


def test_only_the_namespace_of_prometheus_may_ask_for_metrics(objects: tuple[Object, ...]) -> None:
    for role in MEMBERS:
        assert opened(objects, "ingress", labels_of(objects)[role], None, "monitoring") == {METRICS_PORT}
        assert opened(objects, "ingress", labels_of(objects)[role], None, "somewhere") == set()


def to_store(objects: tuple[Object, ...]) -> set[int]:
    has_policy = any(each["metadata"]["name"].endswith(f"-{STORE}") for each in of_kind(objects, "NetworkPolicy"))
    assert has_policy is not bool(of_kind(objects, "PersistentVolumeClaim")), "checkpoints are here or there"
    return {443} if has_policy else set()


def test_nothing_else_goes_out_or_in(objects: tuple[Object, ...]) -> None:
    """But names to be resolved, certificates to the API server, and checkpoints to their store."""
    for name, pod in pod_templates(objects):
        labels = pod["metadata"]["labels"]
        out = opened(objects, "egress", labels, None, "somewhere")
        if name.endswith("-certificates"):
            assert out >= {53, 443, 6443} and opened(objects, "ingress", labels, labels) == set()
        else:
            assert out == {53, *to_store(objects)}
