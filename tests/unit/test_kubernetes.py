"""The Kubernetes backend: objects by the schemas of their makers, and a `kubectl` that replays answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pydantic
import pytest
import yaml
from kubeflow_trainer_api import models

from launch.backends import kubernetes
from launch.kubernetes.objects import job_name
from trainer import config as configuration
from trainer.outcome import RunError

ROOT = Path(__file__).parents[2]
OPTIONS = {"image": "registry/orthogon:cuda", "claim": "runs", "nodes": 2, "gpus_per_node": 2, "labels": {"queue": "a"}}


@pytest.fixture
def run(tmp_path) -> tuple[Any, Path]:
    config = configuration.load(ROOT / "configs" / "quickstart.yaml", [f"--runs={tmp_path}", "--name=My_Run.1"])
    (config.folder / "logs" / "3").mkdir(parents=True)
    return config, config.folder


@pytest.fixture
def answer(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    """`answer(code, stdout, stderr)` sets what `kubectl` says from now on; it returns the file of its arguments."""

    def set_to(code: int = 0, out: str = "", err: str = "") -> Path:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "out").write_text(out)
        (tmp_path / "err").write_text(err)
        program = tmp_path / "bin" / "kubectl"
        program.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/asked"\ncat "{tmp_path}/out"\ncat "{tmp_path}/err" >&2\nexit {code}\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
        return tmp_path / "asked"

    return set_to


def objects(run, **more: Any) -> list[dict[str, Any]]:  # type: ignore[no-untyped-def]
    return list(yaml.safe_load_all(kubernetes.describe(*run, options(**more))))


def options(**more: Any) -> Any:
    return pydantic.TypeAdapter(kubernetes.Options).validate_json(json.dumps(OPTIONS | more))


def test_a_job_that_pods_can_find_each_other_in(run) -> None:
    service, job = objects(run)
    name = job["metadata"]["name"]
    assert name.startswith("orthogon-my-run-1-")
    assert name.endswith("-4")  # the next attempt
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    assert (service["metadata"]["name"], pod["subdomain"], service["spec"]["clusterIP"]) == (name, name, "None")
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    container = pod["containers"][0]
    assert container["args"] == [
        "node", "My_Run.1", "--runs=/work/runs", f"--hosts={name}-0.{name},{name}-1.{name}", f"--host={name}-$(HOST_INDEX).{name}",
    ]  # fmt: skip
    assert pod["terminationGracePeriodSeconds"] == 300 + 60
    assert pod["restartPolicy"] == "Never"
    fail, ignore, disrupted = spec["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [65, 66, 73, 78])
    assert (ignore["action"], ignore["onExitCodes"]["values"]) == ("Ignore", [75])
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert job["metadata"]["labels"]["queue"] == "a"


@pytest.mark.parametrize("gpus", [0, 2])
def test_service_and_job_are_valid(run, gpus) -> None:
    for one in objects(run, gpus_per_node=gpus):
        kubernetes_validate.validate(one, "1.34", strict=True)
        broken = one | {"spec": one["spec"] | {"completion": 2}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, "1.34", strict=True)


def test_a_train_job_is_valid_and_understood_whole(run) -> None:
    (one,) = objects(run, kind="trainjob")
    parsed = models.TrainerV1alpha1TrainJob.from_dict(one)
    back = json.loads(parsed.to_json())
    assert back == one  # a key that the API does not know would be gone
    pod = one["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    assert pod["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 360
    name = one["metadata"]["name"]
    assert f"--hosts={name}-node-0-0.{name},{name}-node-0-1.{name}" in one["spec"]["trainer"]["args"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": ""}, "image is missing"),
        ({"claim": ""}, "claim is missing"),
        ({"mount": "runs"}, "no absolute path"),
        ({"gpus_per_node": 8}, "resources.ranks is 2"),
    ],
)
def test_options_that_make_no_job_are_refused(run, change, said) -> None:
    with pytest.raises(RunError, match=said):
        kubernetes.describe(*run, options(**change))
    with pytest.raises(RunError, match="cannot wait"):
        kubernetes.submit(*run, options(), resume=False, after=["other"])


def test_numbers_below_one_are_refused() -> None:
    for change in ({"nodes": 0}, {"gpus_per_node": -1}, {"kind": "pod"}):
        with pytest.raises(pydantic.ValidationError):
            options(**change)


def test_names_are_dns_labels_and_differ(tmp_path) -> None:
    names = [job_name(tmp_path / n) for n in ("a.b", "a-b", "a_b", "A-b", "x" * 100, "x" * 99)]
    assert len(set(names)) == 6
    assert all(len(name) < 60 and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) for name in names)


def test_submit_and_what_the_status_means(run, answer) -> None:
    asked = answer(0, "job.batch/x created\n")
    handle = kubernetes.submit(*run, options(), resume=False)
    assert asked.read_text().split("\n")[:2] == ["create", "--namespace=default"]
    assert (run[1] / kubernetes.MANIFEST).read_text() == kubernetes.describe(*run, options())
    assert json.loads(json.dumps(handle)) == handle

    def told(**status: Any) -> tuple[str, str]:
        answer(0, json.dumps({"status": status}))
        return kubernetes.state(run[1], handle)

    assert told()[0] == "pending"
    assert told(active=2, ready=0) == ("pending", "2 pods wait for a node or an image")
    assert told(conditions=[{"type": "Suspended", "status": "True"}]) == ("pending", "suspended, by a queue or by hand")
    assert told(active=2, ready=1) == ("running", "1 of 2 pods are ready")
    assert told(jobsStatus=[{"name": "node", "active": 1, "ready": 1}])[0] == "running"
    assert told(conditions=[{"type": "Complete", "status": "True"}]) == ("ended", "complete")
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 78"}
    assert told(conditions=[failed]) == ("ended", "failed (PodFailurePolicy: exit code 78)")
    answer(1, "", 'Error from server (NotFound): jobs.batch "x" not found')
    assert kubernetes.state(run[1], handle)[0] == "vanished"
    answer(1, "", "The connection to the server was refused")
    assert kubernetes.state(run[1], handle) == ("unknown", "The connection to the server was refused")
    answer(0, "no json")
    assert kubernetes.state(run[1], handle)[0] == "unknown"
    answer(1, "", "Unauthorized")
    with pytest.raises(RunError, match="was not cancelled: Unauthorized") as error:
        kubernetes.cancel(run[1], handle, False)
    assert error.value.outcome.code == 69


def test_refusals_and_no_kubectl(run, answer, monkeypatch) -> None:
    answer(1, "", 'Error from server (AlreadyExists): jobs.batch "x" already exists')
    with pytest.raises(RunError, match="did not take") as error:
        kubernetes.submit(*run, options(), resume=False)
    assert error.value.outcome.code == 78
    answer(1, "", "")
    with pytest.raises(RunError) as error:
        kubernetes.submit(*run, options(), resume=True)
    assert error.value.outcome.code == 69
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="kubectl is not on PATH") as error:
        kubernetes.submit(*run, options(), resume=False)
    assert error.value.outcome.code == 78
    assert kubernetes.state(run[1], {"kind": "job", "name": "x", "namespace": "d"})[0] == "unknown"
