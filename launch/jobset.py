"""The JobSet manifest of a job on GKE: slices are replicas of one indexed Job, hosts are its pods.

JobSet (0.10 or newer) restarts all pods together, makes the headless service by which they find each other and
keeps a slice to one node pool; GKE injects TPU_WORKER_* and, between slices, MEGASCALE_*. JAX needs nothing else.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from launch.job import MOUNT, Job, kubernetes_literal, shell
from moe_jax.errors import MISTAKEN, PREEMPTED
from moe_jax.run_lock import OWNER

_CONTAINER = "train"


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet as plain values."""
    kind = job.slice
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "failurePolicy": _failure_policy(job),
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": job.slices,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "parallelism": kind.hosts,
                            "completions": kind.hosts,
                            "backoffLimit": 0,  # a pod alone cannot come back: its peers hang without it
                            "podFailurePolicy": {"rules": [_fail_on(MISTAKEN), _fail_on(PREEMPTED), _EVICTED]},
                            "template": _pod_template(job),
                        }
                    },
                }
            ],
        },
    }


_EVICTED = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


# BlockingRecreate ends all pods of a JobSet before it starts them again: a lease of its own is an earlier pod's.
_OWNER = {
    "name": OWNER,
    "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/jobset-uid']"}},
}


def _fail_on(status: int) -> dict[str, Any]:
    codes = {"containerName": _CONTAINER, "operator": "In", "values": [status]}
    return {"action": "FailJob", "onExitCodes": codes}


def _failure_policy(job: Job) -> dict[str, Any]:
    """Fail at once on a wrong configuration, restart without counting on preemption, count everything else.

    The Job's message is all that tells the exit codes apart ("failed with exit code 2 matching FailJob rule").
    """
    return {
        "maxRestarts": job.max_restarts,
        # Two generations of pods must never write to one run folder.
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": "configuration",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [f"exit code {MISTAKEN} "],
            },
            {
                "name": "preemption",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [f"exit code {PREEMPTED} ", "DisruptionTarget"],
            },
        ],
    }


def on_host_network(job: Job) -> bool:
    """Between slices the host's own network is faster; the storage driver needs the pod's identity."""
    return job.slices > 1 and job.host_network and not job.mount


def _pod_template(job: Job) -> dict[str, Any]:
    kind = job.slice
    selector = {
        "cloud.google.com/gke-tpu-accelerator": kind.facts.label,
        "cloud.google.com/gke-tpu-topology": kind.topology,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists"}]
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
    if job.reservation:
        selector["cloud.google.com/reservation-name"] = job.reservation
    # The TPU runtime's threads share memory through /dev/shm, which is 64 MB unless it is asked for.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    metadata = {}
    if job.mount:
        metadata = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        # Checkpoints are committed, and set aside, by renaming their folders. In buckets without a hierarchical
        # namespace gcsfuse refuses that (its limit is 0), unless it knows the machine type; then it has this limit:
        # https://cloud.google.com/storage/docs/cloud-storage-fuse/cli-options
        # What a host knows of the bucket it would else know for good on large machines, whatever its peers do.
        options = "implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0"
        attributes = {"bucketName": job.bucket_name, "mountOptions": options}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        volumes.append({"name": "bucket", "csi": driver})
        mounts.append({"name": "bucket", "mountPath": MOUNT})
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": job.image,
        "command": [kubernetes_literal(word) for word in job.command],
        "env": [{"name": name, "value": kubernetes_literal(value)} for name, value in job.env.items()] + [_OWNER],
        "resources": {"limits": {"google.com/tpu": kind.chips_per_host}},
        "volumeMounts": mounts,
        # The driver locks the memory through which it talks to the chips, more than a container may by itself:
        # https://cloud.google.com/kubernetes-engine/docs/how-to/tpus#privileged-mode
        "securityContext": {"privileged": job.host_network},
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": volumes,
    }
    if job.service_account:
        spec["serviceAccountName"] = job.service_account
    if on_host_network(job):
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return ({"metadata": metadata} if metadata else {}) | {"spec": spec}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that any YAML reader could take for something else (1e3, 0o7, y, =)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    plain = re.fullmatch(r"[A-Za-z][\w./-]+", value, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def render(job: Job) -> str:
    """The manifest as YAML."""
    return yaml.dump(manifest(job), Dumper=_Dumper, sort_keys=False, width=10**6)


def hints(job: Job) -> list[str]:
    """The commands around the manifest, and what one should know."""
    kind, many = job.slice, job.slices > 1
    pool = [
        "gcloud", "container", "node-pools", "create", f"{job.name}-0", "--cluster=CLUSTER", "--location=LOCATION",
        "--node-locations=ZONE", f"--machine-type={kind.machine_type}", f"--num-nodes={kind.hosts}",
        "--scopes=cloud-platform",  # by default nodes may only read buckets
    ]  # fmt: skip
    lines = []
    if kind.hosts > 1 and kind.family != "tpu7x":  # a pool of single hosts has no shape
        pool.append(f"--tpu-topology={kind.topology}")
    elif kind.hosts > 1:  # its shape comes from a policy
        pool.append(f"--placement-policy={job.name}")
        lines += [
            f"gcloud compute resource-policies create workload-policy {job.name} --type=HIGH_THROUGHPUT "
            f"--accelerator-topology={kind.topology} --region=REGION"
        ]
    pool += ["--spot"] if job.spot else []
    if job.reservation:
        pool += ["--reservation-affinity=specific", f"--reservation={job.reservation}"]
    lines += [
        shell(pool) + (f"    # and so on to {job.name}-{job.slices - 1}" if many else ""),
        f"kubectl logs -f -l jobset.sigs.k8s.io/jobset-name={job.name} --prefix --max-log-requests="
        f"{job.slices * kind.hosts}",
        f"kubectl delete jobset {job.name}    # before the same name is submitted again",
        f"gcloud container node-pools delete {job.name}-0 --cluster=CLUSTER --location=LOCATION  # ends the costs",
    ]
    if on_host_network(job):
        lines.append("# On the host network the node pool's service account reaches the bucket, not the pod's.")
    if job.spot:
        lines.append(
            "# Spot machines end 15 s after the notice, whatever the grace period: raise the node pool's own period"
            " (GKE 1.35, up to 120 s) or save often."
        )
    return lines
