"""The manifests in deploy/: valid, and in agreement with each other and with the picker.

Core kinds are checked against Kubernetes' own schemas, which kubernetes-validate carries. Custom resources
are checked against `crd_schemas`, and against the published definitions too where those lie in the folder
that KVIST_CRDS names, or in ../shared/crds: files of CustomResourceDefinitions, not part of this repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("jsonschema")

import jsonschema
import yaml
from crd_schemas import SPECS, schema

from kvist.picker import kube

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PUBLISHED = Path(os.environ.get("KVIST_CRDS") or ROOT.parent / "shared" / "crds")
CORE = re.compile(r"^(v1|apps/v1|rbac\.authorization\.k8s\.io/v1)$")


def documents(folder: Path) -> list[dict[str, Any]]:
    """What kustomize would put together: the resources of a folder and of those it names."""
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    found = []
    for name in names:
        path = (folder / name).resolve()
        if path.is_dir():
            found += documents(path)
        else:
            found += [document for document in yaml.safe_load_all(path.read_text()) if document]
    return found


ALL = documents(DEPLOY / "example")
IDS = [f"{document['kind']}-{document['metadata']['name']}" for document in ALL]


def one(kind: str, name: str = "") -> dict[str, Any]:
    found = [d for d in ALL if d["kind"] == kind and name in ("", d["metadata"]["name"])]
    assert len(found) == 1, (kind, name)
    return found[0]


def test_every_file_is_part_of_it() -> None:
    listed = {"kustomization.yaml", "Dockerfile"}
    for path in DEPLOY.rglob("kustomization.yaml"):
        listed |= set(yaml.safe_load(path.read_text())["resources"])
    assert {path.name for path in DEPLOY.rglob("*") if path.is_file()} <= listed


@pytest.mark.parametrize("document", ALL, ids=IDS)
def test_documents_are_valid(document: dict[str, Any]) -> None:
    version, kind = document["apiVersion"], document["kind"]
    if CORE.match(version):
        validate = pytest.importorskip("kubernetes_validate")
        validate.validate(document, "1.31", strict=True)
    else:
        jsonschema.validate(document, schema(version, kind))


@pytest.mark.parametrize("change", ["targetPort", "failureMode", "selector"])
def test_a_wrong_pool_would_be_found(change: str) -> None:
    pool = {**one("InferencePool")}
    spec = pool["spec"] = {**pool["spec"]}
    if change == "targetPort":
        spec["targetPort"] = spec.pop("targetPorts")
    elif change == "failureMode":
        spec["endpointPickerRef"] = {**spec["endpointPickerRef"], "failureMode": "open"}
    else:
        spec["selector"] = {"app": "llm"}  # as in v1alpha2
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(pool, schema(pool["apiVersion"], pool["kind"]))


def published() -> dict[tuple[str, str], dict[str, Any]]:
    """Schemas of CustomResourceDefinitions, by apiVersion and kind."""
    found = {}
    for path in sorted(PUBLISHED.rglob("*.yaml")) if PUBLISHED.is_dir() else []:
        for document in yaml.safe_load_all(path.read_text()):
            if (document or {}).get("kind") != "CustomResourceDefinition":
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = closed(version["schema"]["openAPIV3Schema"])
    return found


def closed(part: Any, name: str = "") -> Any:
    """As an API server that refuses unknown fields sees a structural schema."""
    if isinstance(part, list):
        return [closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    made = {key: closed(value, key) for key, value in part.items()}
    # `properties` names fields, and those of `metadata` are the API server's business.
    if name != "properties" and "properties" in part and "additionalProperties" not in part:
        made["additionalProperties"] = False
    return made


@pytest.mark.parametrize("key", list(SPECS), ids=[kind for _, kind in SPECS])
def test_custom_resources_fit_the_published_definitions(key: tuple[str, str]) -> None:
    known = published()
    if key not in known:
        pytest.skip(f"no definition of {key[1]} {key[0]} in {PUBLISHED.name}: name its folder in KVIST_CRDS")
    documents = [d for d in ALL if (d["apiVersion"], d["kind"]) == key]
    assert documents
    for document in documents:
        jsonschema.validate(document, known[key])


def container() -> dict[str, Any]:
    (found,) = one("Deployment", "llm-picker")["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_the_pool_finds_its_picker_and_its_pods() -> None:
    spec = one("InferencePool")["spec"]
    service = one("Service", spec["endpointPickerRef"]["name"])
    port = next(
        p for p in service["spec"]["ports"] if p["port"] == spec["endpointPickerRef"]["port"]["number"]
    )
    ports = {p["name"]: p["containerPort"] for p in container()["ports"]}
    assert ports[port["targetPort"]] == 9002
    template = one("Deployment", "llm-picker")["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    pods = one("Deployment", "llm")["spec"]["template"]
    assert spec["selector"]["matchLabels"].items() <= pods["metadata"]["labels"].items()
    serving = {p["containerPort"] for p in pods["spec"]["containers"][0]["ports"]}
    assert {p["number"] for p in spec["targetPorts"]} <= serving
    for objective in (d for d in ALL if d["kind"] == "InferenceObjective"):
        assert objective["spec"]["poolRef"]["name"] == one("InferencePool")["metadata"]["name"]
    (backend,) = one("HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert (backend["group"], backend["kind"], backend["name"]) == (
        "inference.networking.k8s.io",
        "InferencePool",
        one("InferencePool")["metadata"]["name"],
    )


def test_the_pickers_arguments_are_taken() -> None:
    """By the real command line, which refuses options and values that it does not know."""
    from typer.main import get_command

    from kvist.cli import app
    from kvist.cli import picker as command

    command.register(app)
    name, *arguments = container()["args"]
    context = get_command(app).commands[name].make_context(name, list(arguments))  # type: ignore[attr-defined]
    given = {key: value for key, value in context.params.items() if value}
    assert given["pool_name"] == one("InferencePool")["metadata"]["name"]
    assert given["host"] == "0.0.0.0" and given["secure_serving"]
    pod = one("Deployment", "llm-picker")["spec"]["template"]["spec"]
    assert given["drain_timeout"] < pod["terminationGracePeriodSeconds"]
    assert pod["enableServiceLinks"] is False  # else Kubernetes sets variables that look like options
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert str(Path(given["snapshot"]).parent) in mounts


def test_probes_ask_what_the_picker_answers() -> None:
    from kvist.picker.server import HEALTH_NAMES

    for probe in ("livenessProbe", "readinessProbe"):
        grpc = container()[probe]["grpc"]
        assert grpc["service"] in HEALTH_NAMES and grpc["port"] == 9003


def test_the_role_allows_what_is_watched_and_no_more() -> None:
    rules = one("Role", "llm-picker")["rules"]
    allowed = {
        (group, what, verb)
        for r in rules
        for group in r["apiGroups"]
        for what in r["resources"]
        for verb in r["verbs"]
    }
    needed = {
        ("", "pods"),
        ("inference.networking.k8s.io", "inferencepools"),
        (kube.OBJECTIVE_GROUP, "inferenceobjectives"),
    }
    assert allowed == {(group, what, verb) for group, what in needed for verb in ("list", "watch")}
    binding = one("RoleBinding", "llm-picker")
    assert (
        binding["subjects"][0]["name"]
        == one("Deployment", "llm-picker")["spec"]["template"]["spec"]["serviceAccountName"]
    )
    assert binding["roleRef"]["name"] == one("Role", "llm-picker")["metadata"]["name"]
