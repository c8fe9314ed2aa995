"""`sdworker deploy` against a server that holds every request and answer to RunPod's description of its API."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from sdworker.cli.main import app
from sdworker.operate import client, deploy
from sdworker.operate.hub import hub_json, presets

DATA = Path(os.environ.get("SDWORKER_DATA", ""))
pytestmark = pytest.mark.skipif(not (DATA / "runpod-openapi-v2.json").is_file(),
                                reason="RunPod's descriptions are in no folder that SDWORKER_DATA names")
HUB = Path(__file__).parent.parent / "hub.json"
SECRET = "rpa_SECRETKEYOFTHISTEST"


class Description:
    """RunPod's OpenAPI description, as a check of requests and answers."""

    def __init__(self):
        self.text = json.loads((DATA / "runpod-openapi-v2.json").read_text())

    def wrong(self, schema: dict, body: object) -> list[str]:
        validator = Draft202012Validator(schema | {"components": self.text["components"]})
        return [error.message for error in validator.iter_errors(body)]

    def operation(self, method: str, path: str) -> dict:
        for pattern, operations in self.text["paths"].items():
            if re.fullmatch(re.sub(r"{\w+}", "[^/]+", pattern), path) and method.lower() in operations:
                return operations[method.lower()]
        raise AssertionError(f"{method} {path} is in no description")

    def wrong_request(self, method: str, path: str, body: object) -> list[str]:
        request = self.operation(method, path).get("requestBody")
        return self.wrong(request["content"]["application/json"]["schema"], body) if request else []

    def wrong_answer(self, method: str, path: str, status: int, body: object) -> list[str]:
        content = self.operation(method, path)["responses"][str(status)].get("content")
        return self.wrong(content["application/json"]["schema"], body) if content else []


class Account:
    """Templates and endpoints in memory, with faults that are planned for requests to come."""

    def __init__(self):
        self.description = Description()
        self.things = {"templates": {}, "serverless": {}}
        self.seen, self.faults, self.broken = [], [], []  # "METHOD /path", (METHOD, what), what was wrong with answers

    def answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        if wrong := self.description.wrong_request(method, path, body):
            return 422, {"title": "Unprocessable Entity", "status": 422, "detail": wrong[0]}
        collection, *name = path.removeprefix("/v2/").split("/")
        existing = self.things[collection]
        if method == "GET" and name[1:] == ["workers"]:
            names = ("running", "idle", "initializing", "throttled", "unhealthy", "total")
            return 200, {"workers": [], "summary": dict.fromkeys(names, 0)}
        if method == "GET":
            listed = list(existing.values())
            return 200, {collection.replace("serverless", "endpoints"): listed}
        if method == "POST":
            thing = self.made(collection, body) | {"id": f"{collection[:2]}{len(existing)}"}
            existing[thing["id"]] = thing
            return 201, thing
        if name[0] not in existing:
            return 404, {"title": "Not Found", "status": 404, "detail": "resource not found"}
        if method == "DELETE":
            return 204, existing.pop(name[0]) and None
        existing[name[0]] |= body
        return 200, existing[name[0]]

    def made(self, collection: str, body: dict) -> dict:
        """A thing as RunPod gives it back, with what it fills in."""
        container = {"args": "", "ports": [], "registry": None}
        if collection == "templates":
            more = {"mounts": {}, "public": False, "category": "NVIDIA", "allowedCudaVersions": []}
            return container | more | body
        template = self.things["templates"][body["templateId"]]
        base = "https://api.runpod.ai/v2/x"
        urls = {name: f"{base}/{name}" for name in ("run", "runSync", "status", "stream", "cancel", "retry",
                                                    "purgeQueue", "health")}
        if body["type"] == "LOAD_BALANCER":
            urls = {name: f"https://x.api.runpod.ai/{name}" for name in ("base", "health")}
        body = {name: value for name, value in body.items() if name != "templateId"}
        filled = {"requestUrls": urls, "dataCenterIds": [], "networkVolumes": [], "createdAt": "2026-06-01T12:00:00Z"}
        taken = {name: template[name] for name in ("image", "disk", "env", "args", "ports")}
        return container | taken | filled | body | {
            "name": f"{body['name']} -fb", "gpu": {"minCudaVersion": None, "excludedTypes": []} | body["gpu"]}


def handler_of(account: Account) -> type:
    class Handler(BaseHTTPRequestHandler):
        def serve(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            path = self.path
            account.seen.append(f"{self.command} {path}")
            if self.headers["Authorization"] != f"Bearer {SECRET}":
                return self.send(401, {"title": "Unauthorized", "status": 401, "detail": "invalid token"})
            fault = next((one for one in account.faults if one[0] == self.command), None)
            if fault:
                account.faults.remove(fault)
                if fault[1] == "silence after the deed":
                    account.answer(self.command, path, body)
                    return time.sleep(1)
                if fault[1] == "hang":
                    return time.sleep(1)
                return self.send(fault[1], {"title": "Fault", "status": fault[1], "detail": f"planned {SECRET[:4]}"})
            status, answer = account.answer(self.command, path, body)
            if status < 400:
                account.broken += account.description.wrong_answer(self.command, path, status, answer)
            return self.send(status, answer)

        do_GET = do_POST = do_PATCH = do_DELETE = serve

        def send(self, status: int, answer: object) -> None:
            content = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *about: object) -> None:
            pass

    return Handler


@pytest.fixture
def account(monkeypatch):
    account = Account()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(account))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(deploy, "API", f"http://127.0.0.1:{server.server_port}/v2")
    monkeypatch.setenv("RUNPOD_API_KEY", SECRET)
    monkeypatch.setattr(client.send, "__defaults__", (None, 0.5, 4))  # half a second for an answer
    yield account
    server.shutdown()
    server.server_close()
    assert account.broken == [], "the server itself gives what the description says"


def run(account: Account, *arguments: str) -> object:
    done = CliRunner().invoke(app, ["deploy", "--hub", str(HUB), *arguments])
    assert SECRET not in done.output and (done.exception is None or isinstance(done.exception, SystemExit))
    return done


def deployed(account: Account, *arguments: str) -> list[str]:
    """The verbs of a plan that is carried out."""
    done = run(account, "--image", "docker.io/you/sdworker:1", "--yes", "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    return [step["verb"] for step in json.loads(done.stdout)["steps"]]


def written(account: Account) -> list[str]:
    return [request for request in account.seen if not request.startswith("GET")]


def test_an_endpoint_is_made_changed_shown_and_deleted(account):
    assert deployed(account) == ["create", "create"]
    templates, endpoints = account.things.values()
    assert len(templates) == len(endpoints) == 1
    made = next(iter(endpoints.values()))
    assert (made["flashboot"], made["workers"]) == ("FLASHBOOT", {"min": 1, "max": 3, "idleTimeout": 5})
    account.seen.clear()
    assert deployed(account) == ["keep", "keep"] and written(account) == [], "called again, it does nothing"
    templates["te0"]["env"]["MINE"] = "set in the console"
    assert deployed(account, "--max", "5", "--env", "SDWORKER_LOAD=lazy") == ["update", "update"]
    assert next(iter(templates.values()))["env"]["MINE"] == "set in the console"
    assert next(iter(templates.values()))["env"]["SDWORKER_LOAD"] == "lazy"
    assert json.loads(run(account, "--status", "--json").stdout)["endpoint"]["id"] == made["id"]
    assert len(json.loads(run(account, "--delete", "--yes", "--json").stdout)["deleted"]) == 2
    assert not templates and not endpoints
    assert json.loads(run(account, "--delete", "--yes", "--json").stdout) == {"deleted": []}
    assert "there is no endpoint called 'sdworker'" in run(account, "--status").stderr


def test_without_a_yes_nothing_is_sent(account):
    assert run(account, "--image", "you/sdworker:1").exit_code == 1
    assert run(account, "--dry-run").exit_code == 0 and written(account) == []


@pytest.mark.parametrize("preset", ["", *(one["name"] for one in presets())])
def test_every_preset_is_a_valid_payload(preset):
    spec = deploy.build_spec(hub_json(), preset=preset, image="you/sdworker:1")
    for step in deploy.plan_steps(None, spec):
        assert Description().wrong_request("POST", f"/v2{step.path}", step.body) == []


def test_an_endpoint_with_a_load_balancer(account):
    balanced = ("--type", "load-balancer", "--env", "PORT=5000")
    assert deployed(account, *balanced) == ["create", "create"]
    made = next(iter(account.things["serverless"].values()))
    assert (made["type"], made["args"], made["ports"]) == ("LOAD_BALANCER", "sdworker http", ["5000/http"])
    assert made["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 4} and made["env"]["PORT_HEALTH"] == "5000"
    assert deployed(account, *balanced) == ["keep", "keep"]
    other = run(account, "--image", "docker.io/you/sdworker:1", "--yes")
    assert other.exit_code == 1 and "exists and has no queue; that cannot be changed" in other.stderr


def test_the_server_would_notice(account):
    """A contract test that accepts anything would be none."""
    step = deploy.plan_steps(None, deploy.build_spec(hub_json(), image="you/sdworker:1"))[1]
    wrong = {"workers": {"min": "one"}}
    with deploy.account_of() as http, pytest.raises(deploy.DeployError, match="gave 422"):
        deploy.apply(http, [deploy.Step("endpoint", "create", step.path, step.body | wrong | {"templateId": "te0"})])


def test_the_dry_run_needs_no_key_and_prints_a_payload_that_runpod_takes():
    environment = {name: value for name, value in os.environ.items() if name != "RUNPOD_API_KEY"}
    command = [sys.executable, "-m", "sdworker.cli.main", "deploy", "--dry-run", "--json"]
    done = subprocess.run(command, cwd=HUB.parent, env=environment, capture_output=True, text=True, check=True)
    template, endpoint = (step["body"] for step in json.loads(done.stdout)["steps"])
    described = Description()
    assert described.wrong_request("POST", "/v2/templates", template) == []
    assert described.wrong_request("POST", "/v2/serverless", endpoint) == []
    assert endpoint["flashboot"] == "FLASHBOOT" and endpoint["workers"] == {"min": 1, "max": 3, "idleTimeout": 5}


@pytest.mark.parametrize(("status", "message"), [(401, "the key is not accepted"), (403, "the key may not do that"),
                                              (409, "planned"), (500, "planned")])
def test_a_refusal_is_reported_and_the_next_call_goes_on(account, status, message):
    account.faults = [("POST", status)]
    failed = run(account, "--image", "docker.io/you/sdworker:1", "--yes")
    assert failed.exit_code == 1 and f"the template was not created: POST /templates gave {status}" in failed.stderr
    assert message in failed.stderr and "Traceback" not in failed.output
    assert len(written(account)) == 1, "nothing is sent twice that may have been done"
    assert deployed(account) == ["create", "create"]


def test_a_wrong_key_is_named_and_not_shown(account, monkeypatch):
    monkeypatch.setenv("RUNPOD_API_KEY", "wrong")
    assert "gave 401: the key is not accepted" in run(account, "--status").stderr


def test_too_many_requests_are_made_when_they_may_be(account, monkeypatch):
    account.faults, waits = [("GET", 429), ("POST", 429)], []
    monkeypatch.setattr("time.sleep", waits.append)
    assert deployed(account) == ["create", "create"]
    assert [wait for wait in waits if wait >= 1] == [1, 1], "Retry-After says a second, twice"


def test_reads_are_retried(account):
    account.faults = [("GET", 500), ("GET", "hang")]
    assert deployed(account) == ["create", "create"]


def test_what_was_interrupted_between_template_and_endpoint_goes_on(account):
    assert deployed(account) == ["create", "create"]
    account.things[list(account.things)[1]].clear()
    assert deployed(account) == ["keep", "create"]


def test_silence_after_a_post_makes_nothing_twice(account):
    account.faults = [("POST", "silence after the deed")]
    failed = run(account, "--image", "docker.io/you/sdworker:1", "--yes")
    assert "It may exist nevertheless: the same command checks." in failed.stderr
    assert deployed(account) == ["keep", "create"]
    assert all(len(things) == 1 for things in account.things.values())


def test_a_delete_without_an_answer_is_tried_again(account):
    deployed(account)
    account.faults = [("DELETE", "silence after the deed")]
    assert run(account, "--delete", "--yes").exit_code == 0
    assert not any(account.things.values())
