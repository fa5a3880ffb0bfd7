"""Who may ask the live explorer, and how much: abuse is answered by a status and a reason, and the server lives."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import psutil
import pytest

from tests import families
from tests.explorers import serving
from tl_flash.explore.guard import COOKIE, LARGEST_BODY
from tl_flash.explore.server import hosts_of, is_loopback

MB = 1 << 20
GOOD = {"prompt": "the dog", "n_tokens": 2}


@pytest.fixture(scope="module")
def explorer():
    model = families.build("llama", "bridge" if families.HAS_BRIDGE else "hooked-raw")
    with serving(model, texts=["the dog saw a cat"], prepare=False) as explorer:
        yield explorer


@pytest.fixture(autouse=True)
def lives(explorer):
    """After whatever a test did, a job is still done."""
    yield
    assert explorer.ask("write", **GOOD)[-1]["type"] == "done"


def refused(answer, status, why):
    assert answer.status_code == status and why in answer.text, (answer.status_code, answer.text[:300])


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", ""]
)
@pytest.mark.parametrize("path", ["/", "/api/session", "/data/vocab"])
def test_another_host_is_refused(explorer, host, path):
    refused(explorer.http.get(path, headers={"Host": host}), 421, "does not go by that Host")


def test_its_own_names_are_not(explorer):
    port = explorer.address.rsplit(":", 1)[1]
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        assert explorer.http.get("/api/session", headers={"Host": f"{name}:{port}"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1", "file://"]
)
def test_another_sites_page_is_refused(explorer, origin):
    for answer in (
        explorer.post("/api/write", GOOD, headers={"Origin": origin}),
        explorer.http.get("/api/session", headers={"Origin": origin}),
        explorer.http.options("/api/write", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}),
    ):
        refused(answer, 403, "another site")
        assert "access-control-allow-origin" not in answer.headers


def test_its_own_page_is_not(explorer):
    headers = {"Origin": explorer.address, "Sec-Fetch-Site": "same-origin"}
    assert explorer.post("/api/write", GOOD, headers=headers).status_code == 202


def test_what_browsers_say_of_another_site_is_heard(explorer):
    for site in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": site}
        refused(explorer.http.get("/api/session", headers=headers), 403, "another site")
        refused(explorer.post("/api/write", GOOD, headers=headers), 403, "another site")
        assert explorer.http.get("/", headers=headers).status_code == 200, "a link may lead here"


def test_a_form_of_another_site_could_not_speak_json(explorer):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = explorer.http.post("/api/write", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        refused(answer, 415, "application/json")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe\x00", b"[" * 200_000, b'{"a":' * 40_000, b'{"prompt": NaN',
     b'{"prompt": "x", "n_tokens": 1e999}'],
)  # fmt: skip
def test_malformed_json_is_refused(explorer, body):
    answer = explorer.http.post("/api/write", content=body, headers={"Content-Type": "application/json"})
    refused(answer, 400, "expected")
    assert answer.json()["why"]


@pytest.mark.parametrize(
    ("kind", "change", "why"),
    [
        ("write", {"prompt": 3}, "prompt: expected a text"),
        ("write", {"prompt": ""}, "prompt: expected a text"),
        ("write", {"prompt": "x" * 4001}, "a text of 4001 characters"),
        ("write", {"prompt": "\ud800"}, "surrogate"),
        ("write", {"n_tokens": 0}, "n_tokens: expected"),
        ("write", {"n_tokens": 10**30}, "n_tokens: expected"),
        ("write", {"n_tokens": True}, "n_tokens: expected"),
        ("write", {"chat": "yes"}, "chat: expected true or false"),
        ("write", {"doses": []}, "doses: expected"),
        ("write", {"doses": {f"L0N{i}": 1 for i in range(33)}}, "doses: expected at most 32"),
        ("write", {"doses": {"L0N1": "5"}}, "doses.L0N1: expected a number"),
        ("write", {"doses": {"L0N1": 1e9}}, "doses.L0N1: expected a number"),
        ("write", {"doses": {"../../etc": 1}}, "doses: "),
        ("write", {"doses": {"L0E1N1": 1}}, "doses: "),
        ("write", {"mode": "explode"}, "mode: expected one of set"),
        ("write", {"mode": ["set"]}, "mode: expected one of set"),
        ("write", {"positions": [0]}, "positions: expected one of"),
        ("write", {"path": "/etc/passwd"}, "expected no field 'path'"),
        ("find", {"concept": "x" * 81}, "concept: expected"),
        ("find", {"concept": "dog", "tokens": []}, "tokens: expected"),
        ("find", {"concept": "dog", "tokens": [10**9]}, "tokens: expected"),
        ("activations", {"neuron": "L0N1", "text": "x" * 20_001}, "text: expected"),
        ("activations", {"neuron": 7, "text": "x"}, "neuron: expected"),
        ("dose", {"neuron": "L0N1", "token": -1, "sign": 1}, "token: expected"),
        ("dose", {"neuron": "L0N1", "token": 1, "sign": 0}, "sign: expected"),
        ("validate", {"neuron": "L0N1", "token": 1, "sign": True}, "sign: expected"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_name(explorer, kind, change, why):
    import json

    body = json.dumps((GOOD if kind == "write" else {}) | change)
    answer = explorer.http.post(f"/api/{kind}", content=body, headers={"Content-Type": "application/json"})
    refused(answer, 400, why)


@pytest.mark.parametrize(
    "path",
    ["/data/..%2f..%2fetc%2fpasswd", "/data/%2e%2e/%2e%2e/etc/passwd", "/../../etc/passwd", "/etc/passwd",
     "/data//etc/passwd", "/tl_flash/explore/app.py", "/api/jobs/..%2f..%2fx/events", "/data/vocab%00"],
)  # fmt: skip
def test_no_path_of_the_disk_is_served(explorer, path):
    with socket.create_connection(explorer.address.removeprefix("http://").split(":")) as raw:  # as it is written
        host = explorer.address.removeprefix("http://")
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.split()[1] in (b"404", b"400", b"405") and b"root:" not in answer


def test_every_answer_has_the_policy(explorer):
    for answer in (
        explorer.http.get("/"),
        explorer.http.get("/nothing"),
        explorer.http.get("/", headers={"Host": "x"}),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "connect-src 'self'" in policy and "unsafe-eval" not in policy and "script-src 'sha256-" in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and "server" not in answer.headers


def grown(before):
    return psutil.Process().memory_info().rss - before


def test_a_body_of_50_mb_is_refused_and_not_kept(explorer):
    before = psutil.Process().memory_info().rss
    body = b"x" * (50 * MB)
    headers = {"Content-Type": "application/json"}
    refused(explorer.http.post("/api/write", content=body, headers=headers), 413, f"at most {LARGEST_BODY} bytes")
    pieces = (body[at : at + MB] for at in range(0, len(body), MB))  # chunked: nothing says how long it is
    refused(explorer.http.post("/api/write", content=pieces, headers=headers), 413, "at most")
    refused(explorer.http.post("/api/write", content=body[: LARGEST_BODY + 1], headers=headers), 413, "at most")
    refused(explorer.http.post("/api/write", content=b"x" * LARGEST_BODY, headers=headers), 400, "JSON")
    assert grown(before) < 50 * MB + 60 * MB, "the test's own body, and little more"


def test_200_requests_at_once_are_all_answered(explorer):
    before = psutil.Process().memory_info().rss
    answers, gate = [], threading.Barrier(50)

    def ask(at):
        gate.wait(30)
        with httpx.Client(base_url=explorer.address, timeout=60, trust_env=False) as http:
            for _ in range(4):
                answers.append(http.post("/api/write", json=GOOD | {"n_tokens": 4 + at % 3}))

    with ThreadPoolExecutor(50) as many:
        list(many.map(ask, range(50)))
    statuses = [answer.status_code for answer in answers]
    assert len(statuses) == 200 and set(statuses) <= {202, 429} and 202 in statuses
    assert all("jobs run or wait" in answer.json()["why"] for answer in answers if answer.status_code == 429)
    for id in [answer.json()["id"] for answer in answers if answer.status_code == 202][-8:]:
        assert [event for _, event in explorer.follow(id)][-1]["type"] == "done"
    assert grown(before) < 150 * MB


def test_200_large_bodies_at_once_are_all_refused(explorer):
    before, body = psutil.Process().memory_info().rss, b"x" * (8 * MB)

    def ask(at):
        http = HTTPConnection(explorer.address.removeprefix("http://"), timeout=120)
        http.request("POST", "/api/write", body, {"Content-Type": "application/json"})
        with http.getresponse() as answer:
            told = answer.status, b"at most" in answer.read()
        http.close()
        return told

    with ThreadPoolExecutor(50) as many:
        assert list(many.map(ask, range(200))) == [(413, True)] * 200
    assert grown(before) < 150 * MB


def test_many_followers_are_refused_and_gone_ones_forgotten(explorer):
    from tl_flash.explore.app import MOST_FOLLOWERS

    gate = threading.Event()
    job = explorer.session.jobs.start("wait", lambda job: gate.wait(60))
    try:
        with httpx.Client(base_url=explorer.address, timeout=30, trust_env=False) as http:
            streams = [http.stream("GET", f"/api/jobs/{job.id}/events") for _ in range(MOST_FOLLOWERS)]
            for stream in streams:
                assert stream.__enter__().status_code == 200
            refused(explorer.http.get(f"/api/jobs/{job.id}/events"), 503, "close a tab")
            for stream in streams:
                stream.__exit__(None, None, None)
    finally:
        gate.set()
    assert [event for _, event in explorer.follow(job.id)][-1]["type"] == "done"


def test_unknown_jobs_and_kinds_are_404(explorer):
    refused(explorer.http.get("/api/jobs/write-99999/events"), 404, "no job")
    refused(explorer.post("/api/jobs/write-99999/cancel"), 404, "no job")
    refused(explorer.post("/api/shell", {}), 404, "no such job")
    refused(explorer.http.get("/data/nothing"), 404, "no data")
    assert explorer.http.get("/api/write").status_code == 405
    assert explorer.http.put("/api/write", content=b"").status_code == 405


def test_with_a_token_nothing_is_answered_without_it():
    model = families.build("llama", "bridge" if families.HAS_BRIDGE else "hooked-raw")
    with serving(model, texts=["the dog saw a cat"], token="correct horse", prepare=False) as guarded:
        for path in ("/", "/api/session", "/data/vocab", "/?token=wrong", "/api/session?token=correct%20horse"):
            refused(guarded.http.get(path), 401, "wants its token")
        refused(guarded.post("/api/write", GOOD), 401, "wants its token")
        refused(guarded.http.get("/", headers={"Cookie": f"{COOKIE}=wrong"}), 401, "wants its token")
        refused(guarded.http.get("/", headers={"Cookie": "a\x01=;;;="}), 401, "wants its token")
        home = guarded.http.get("/?token=correct%20horse")
        assert home.status_code == 303 and home.headers["location"] == "/"
        cookie = home.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert guarded.http.get("/api/session").status_code == 200, "the cookie is kept"
        guarded.http.cookies.clear()
        headers = {"Authorization": "Bearer correct horse"}
        assert guarded.http.get("/api/session", headers=headers).status_code == 200


def test_names_of_the_server():
    assert hosts_of("127.0.0.1", 80) >= {"127.0.0.1:80", "127.0.0.1", "localhost"}
    assert hosts_of("0.0.0.0", 9) is None and hosts_of("192.168.1.7", 9) == {"192.168.1.7:9"}
    assert [is_loopback(name) for name in ("localhost", "127.9.9.9", "::1", "0.0.0.0", "example.org", "10.0.0.1")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
