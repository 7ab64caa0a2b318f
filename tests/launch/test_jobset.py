"""The GKE manifest: valid against the published schemas, and what it asks of JobSet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.jobset import hints, manifest, render
from launch.record import read_record
from moe_jax.errors import HUNG, UserError
from moe_jax.run_lock import OWNER
from tests.launch.pod_jobs import NASTY, SUBMIT, TOPOLOGIES, calls, expanded, fake_tools, job, run

ROOT = Path(__file__).parents[2]
CRD = ROOT.parent / "shared" / "schemas" / "jobset.x-k8s.io_jobsets.yaml"
KUBERNETES = "1.34"  # JobSet 0.10's own, and the first with tpu7x on GKE
OPTIONS = ({}, {"spot": True}, {"reservation": "r"}, {"mount": True}, {"service_account": "sa"})
GKE = [
    "gke",
    "mobilemoe_s",
    "seed=3",
    "--topology",
    "v5e-256",
    "--slices",
    "2",
    "--bucket",
    "gs://bucket",
    "--image",
    "IMAGE",
]


def strict(schema: Any) -> Any:
    """The schema with every object closed, as the API server's strict validation reads it."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("additionalProperties") or schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not open_ended:
        schema["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    return schema


@pytest.fixture(scope="module")
def check_jobset():
    if not CRD.exists():
        pytest.skip(f"{CRD.name} is not at hand")
    version = next(v for v in yaml.safe_load(CRD.read_text())["spec"]["versions"] if v["name"] == "v1alpha2")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, checked with the core objects
    return jsonschema.Draft202012Validator(schema).validate


def check_core(found: dict[str, Any]) -> None:
    """The Job template and the pod template as objects of their own, unknown fields refused."""
    template = found["spec"]["replicatedJobs"][0]["template"]
    pod = template["spec"]["template"]
    meta = {"name": found["metadata"]["name"], "annotations": found["metadata"]["annotations"]}
    for kind, api, part in (("Job", "batch/v1", template), ("Pod", "v1", pod)):
        data = {"apiVersion": api, "kind": kind, "metadata": meta | part.get("metadata", {}), "spec": part["spec"]}
        kubernetes_validate.validate(data, KUBERNETES, strict=True)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jobset_fits_its_published_definition(topology, slices, options, check_jobset):
    check_jobset(yaml.safe_load(render(job(topology=topology, slices=slices, **options))))


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_job_and_pod_templates_fit_kubernetes(topology, slices, options):
    check_core(yaml.safe_load(render(job(topology=topology, slices=slices, **options))))


def test_an_unknown_field_anywhere_is_refused(check_jobset):
    good = manifest(job())
    child = good["spec"]["replicatedJobs"][0]["template"]["spec"]
    paths = [good["spec"], good["spec"]["failurePolicy"]["rules"][0], child, child["template"]["spec"]]
    for index in range(len(paths)):
        bad = copy.deepcopy(good)
        deep = bad["spec"]["replicatedJobs"][0]["template"]["spec"]
        part = [bad["spec"], bad["spec"]["failurePolicy"]["rules"][0], deep, deep["template"]["spec"]][index]
        part["typo"] = 1
        with pytest.raises(jsonschema.ValidationError):
            check_jobset(bad)
        if index > 1:
            with pytest.raises(kubernetes_validate.ValidationError):
                check_core(bad)


def pod(**fields: Any) -> dict[str, Any]:
    return manifest(job(**fields))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


@pytest.mark.parametrize(
    ("topology", "label", "shape", "hosts", "chips"),
    [
        ("v5e-256", "tpu-v5-lite-podslice", "16x16", 64, 4),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v6e-1", "tpu-v6e-slice", "1x1", 1, 1),
        ("tpu7x-128", "tpu7x", "4x4x4", 16, 4),
    ],
)
def test_a_slice_is_one_replica_with_a_pod_on_every_host(topology, label, shape, hosts, chips):
    slices = 1 if hosts == 1 else 2
    (replicated,) = manifest(job(topology=topology, slices=slices))["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (slices, hosts, hosts)
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    selector = spec["template"]["spec"]["nodeSelector"]
    assert selector == {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": shape}
    assert spec["template"]["spec"]["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}


def decide(found: dict[str, Any], status: int = 0, disrupted: bool = False) -> str:
    """What Kubernetes and JobSet do about a pod that failed: first matching rules of both."""
    job_spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_spec["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        if codes and codes["operator"] == "In" and status in codes["values"]:
            said = f"Container {codes['containerName']} for pod default/x-0 failed with exit code {status}"
        elif not codes and disrupted:
            said = "Pod default/x-0 has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{said} matching FailJob rule at index {index}"
        break
    for rule in found["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(pattern in message for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_preemption_never_eats_restarts_and_a_wrong_configuration_ends_the_job():
    found = manifest(job(max_restarts=7))
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["restartStrategy"] == "BlockingRecreate"
    assert decide(found, 75) == decide(found, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert decide(found, 2) == "FailJobSet"
    assert [decide(found, status) for status in (1, 134, 137, 22, 200, HUNG)] == ["RestartJobSet"] * 6


def test_pods_find_each_other_share_memory_and_stay_on_the_nodes_of_one_slice():
    found, spec = manifest(job()), pod()["spec"]
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert found["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "mobilemoe-s"}
    assert {"key": "google.com/tpu", "operator": "Exists"} in spec["tolerations"]
    (mount,), (volume,) = spec["containers"][0]["volumeMounts"], spec["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
    assert volume["emptyDir"] == {"medium": "Memory"}
    # A pod that fails stays as it is, and its Job fails with it: JobSet alone starts anew, and all of them.
    rules = found["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert spec["restartPolicy"] == "Never" and [rule["action"] for rule in rules] == ["FailJob"] * 3


@pytest.mark.parametrize(("topology", "hosts"), [("v5e-256", 64), ("v5p-128", 16), ("v6e-1", 1), ("tpu7x-128", 16)])
def test_the_printed_node_pool_has_a_node_for_every_host(topology, hosts):
    assert f"--num-nodes={hosts}" in "\n".join(hints(job(topology=topology))).split()


def test_spot_reservation_account_and_grace_reach_the_pod():
    spec = pod(spot=True, grace_seconds=90, service_account="trainer")["spec"]
    assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Exists"} in spec["tolerations"]
    assert spec["terminationGracePeriodSeconds"] == 90 and spec["serviceAccountName"] == "trainer"
    assert pod(reservation="r")["spec"]["nodeSelector"]["cloud.google.com/reservation-name"] == "r"


def test_only_several_slices_share_the_hosts_network_and_only_when_they_may():
    assert "hostNetwork" not in pod()["spec"]
    assert pod(slices=2)["spec"]["hostNetwork"] is True
    assert "hostNetwork" not in pod(slices=2, host_network=False)["spec"]
    assert "hostNetwork" not in pod(slices=2, mount=True)["spec"]


def test_a_run_is_in_the_bucket_itself_or_in_its_mount():
    assert pod(bucket="gs://b/team/")["spec"]["containers"][0]["command"][-2:] == [
        "--run",
        "gs://b/team/mobilemoe-s",
    ]
    mounted = pod(bucket="gs://b/team", mount=True)
    assert mounted["spec"]["containers"][0]["command"][-1] == "/bucket/team/mobilemoe-s"
    assert mounted["spec"]["volumes"][1]["csi"]["volumeAttributes"]["bucketName"] == "b"
    assert mounted["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_folders_of_a_mounted_bucket_can_be_renamed_as_a_checkpoint_is_when_it_is_complete():
    options = pod(mount=True)["spec"]["volumes"][1]["csi"]["volumeAttributes"]["mountOptions"].split(",")
    limits = [int(word.partition("=")[2]) for word in options if word.startswith("rename-dir-limit=")]
    assert "implicit-dirs" in options and len(limits) == 1 and limits[0] > 10_000


@settings(max_examples=200)
@given(st.lists(NASTY, max_size=4))
def test_any_argument_and_variable_reaches_the_trainer_as_it_was_given(words):
    given_job = job(overrides=words, environment={f"V{i}": word for i, word in enumerate(words)})
    found = yaml.safe_load(render(given_job))
    spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert [expanded(word, given_job.env) for word in spec["command"]] == given_job.command
    *given, owner = spec["env"]
    assert {item["name"]: expanded(item["value"], given_job.env) for item in given} == given_job.env
    assert owner["name"] == OWNER and "jobset-uid" in owner["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize(
    "text", ["1e3", "0o14", "y", "n", "=", "~", "1_000", "0x1f", "2026-01-01", "<<", ".inf", "1:30"]
)
def test_texts_that_some_yaml_readers_take_for_numbers_are_quoted(text):
    line = next(
        line for line in render(job(environment={"V": text})).splitlines() if "value: " in line and text in line
    )
    assert line.strip() == f'value: "{text}"'


def test_gke_prints_the_manifest_and_nothing_else(capfd):
    assert run(*GKE) == 0
    out, err = capfd.readouterr()
    assert yaml.safe_load(out) == manifest(job(slices=2, image="IMAGE", bucket="gs://bucket"))
    assert "512 chips on 128 hosts" in err and "node-pools create" in err and "docker build" in err


def test_submit_hands_kubectl_what_was_printed_and_keeps_standard_output_clean(
    tmp_path, monkeypatch, capfd, bucket
):
    log = fake_tools(tmp_path / "bin", monkeypatch, "kubectl")
    assert run(*GKE, *SUBMIT) == 0
    out = capfd.readouterr().out
    (create,) = calls(log)
    assert create["words"] == ["create", "-f", "-"] and create["stdin"] == out and yaml.safe_load(out)
    assert read_record(f"{bucket}/mobilemoe-s")["launcher"] == "gke"


def test_submit_without_the_tool_names_it_and_starts_nothing(tmp_path, monkeypatch, capfd):
    log = fake_tools(tmp_path / "bin", monkeypatch)
    assert run(*GKE, *SUBMIT) == 2
    assert "kubectl is not on PATH" in capfd.readouterr().err and not log.exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "Upper"}, "--run 'Upper'"),
        ({"name": "a" * 41}, "40"),
        ({"name": "1a"}, "--run"),
        ({"name": "a-"}, "--run"),
        ({"bucket": "b"}, "--bucket"),
        ({"bucket": "gs://"}, "--bucket"),
        ({"image": ""}, "--image"),
        ({"slices": 0}, "--slices"),
        ({"topology": "v5e-4", "slices": 2}, "larger topology"),
        ({"environment": {"a b": "1"}}, "--env"),
        ({"config": "runs/a/config.json"}, "register it"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(fields, words):
    with pytest.raises(UserError) as caught:
        job(**fields)
    assert words in str(caught.value)


def test_the_longest_pod_name_still_is_a_host_name():
    longest = job(name="a" * 40, topology="v5p-12288", slices=9)
    assert len(f"{longest.name}-slice-{longest.slices - 1}-{longest.slice.hosts - 1}-abcde") <= 63


def test_a_job_that_does_not_fit_is_refused_before_anything_is_printed_and_one_that_fits_is_priced(capfd):
    def too_big(cfg, kind, slices, which):
        raise UserError(f"{cfg.stage} does not fit {kind.topology} x {slices}; take a larger topology")

    assert run(*GKE, check_fit=too_big) == 2
    assert capfd.readouterr() == ("", "error: pretrain does not fit 16x16 x 2; take a larger topology\n")
    assert run(*GKE, "--env", "A=b", check_fit=lambda *_: 1e4) == 0
    assert "pretrain: at least 166,667 chip-hours" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mesh.data=3", "mesh slices=2, data=3, fsdp=-1 does not fit 512 device(s); the sizes beside the -1"),
        ("mesh.tensor=8", "does not divide over mesh.tensor=8; use one of 1, 2, 4"),
        ("mesh.slices=4", "mesh.slices is 4, but the devices form 2 slices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_at_once_also_where_nobody_asks_whether_it_fits(capfd, override, words):
    def ask(*_):
        raise AssertionError("compiled")

    for words_of_fit, check in (([], ask), (["--no-fit"], None)):
        assert run(*GKE, *words_of_fit, override, check_fit=check) == 2
        out, err = capfd.readouterr()
        assert out == "" and words in err and err.count("\n") == 1


def test_a_mistyped_option_is_refused_before_anything_is_printed(capfd):
    assert run(*GKE[:2], "data.seq_length=1", *GKE[3:]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "seq_len" in err
