"""MLflow's page behind the door: who may sign in, what a session is good for, what other sites cannot do with it, and the page's files."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway import page
from gateway.access import AccessTable, KeySpec
from gateway.browser import Hosts
from gateway.sessions import Sessions, cookie, derived_secret, of_cookies
from servicekit.access import hash_secret
from servicekit.errors import Forbidden, Unauthenticated

from tests.unit.gateway.conftest import KEY
from tests.unit.gateway.test_mlflow_door import MakeWorld, World, make_world, world

__all__ = ["make_world", "world"]

FORM = {"content-type": "application/x-www-form-urlencoded"}
JSON = {"content-type": "application/json"}


def own(world: World) -> dict[str, str]:
    """What a browser says with a request of the gateway's own page."""
    return {"origin": world.url, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}


@asynccontextmanager
async def signed_in(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """A browser, as far as cookies go, whose user has signed in."""
    async with world.http(authorization="") as http:
        answer = await http.post("/mlflow/sign-in", content=f"key={KEY}", headers=FORM | own(world))
        assert (answer.status_code, answer.headers["location"]) == (303, "/mlflow/")
        yield http


async def test_a_person_signs_in_with_a_key_works_and_signs_out(world: World) -> None:
    async with world.http(authorization="") as http:
        first = await http.get("/mlflow/")
        assert (first.status_code, first.headers["location"]) == (303, "/mlflow/sign-in")
        form = await http.get("/mlflow/sign-in")
        assert form.status_code == 200
        assert "script" not in form.text
        assert "default-src 'none'" in form.headers["content-security-policy"]
    async with signed_in(world) as http:
        told = (await http.get("/mlflow/ajax-api/2.0/mlflow/runs/get?run_id=x", headers=own(world))).json()
        assert told["target"] == "/ajax-api/2.0/mlflow/runs/get?run_id=x"
        assert told["headers"]["headrace-subject"] == "user@here"
        assert "cookie" not in told["headers"]
        assert (await http.post("/mlflow/graphql", content=b"{}", headers=JSON | own(world))).json()["target"] == "/graphql"
        assert (await http.get("/mlflow/get-artifact?path=a")).json()["target"] == "/get-artifact?path=a"
        world.registry.stored_at = "runs:/r1/model"
        of_version = await http.get("/mlflow/model-versions/get-artifact?name=m&version=1&path=MLmodel")
        assert of_version.json()["target"] == "/get-artifact?run_uuid=r1&path=model%2FMLmodel"
        assert (await http.get("/ajax-api/2.0/mlflow/runs/get")).status_code == 200
        assert (await http.get("/mlflow/sign-out")).status_code == 200
        assert (await http.post("/mlflow/sign-out", headers=own(world))).status_code == 303
        assert (await http.get("/mlflow/ajax-api/2.0/mlflow/runs/get")).status_code == 401


async def test_a_session_is_good_for_the_page_alone(world: World) -> None:
    async with signed_in(world) as http:
        asked = len(world.tracker.asked)
        for path in ("/api/2.0/mlflow/runs/get", "/graphql", "/get-artifact", "/version"):
            assert (await http.get(path)).status_code == 401
        assert len(world.tracker.asked) == asked
        assert (await http.get("/v2")).status_code == 401


async def test_a_cookie_is_out_of_reach_of_scripts_and_of_other_sites(world: World, make_world: MakeWorld) -> None:
    async with world.http(authorization="") as http:
        answer = await http.post("/mlflow/sign-in", content=f"key={KEY}", headers=FORM | own(world))
        assert KEY not in answer.headers["set-cookie"]
        parts = answer.headers["set-cookie"].split("; ")
        assert {"Path=/", "HttpOnly", "SameSite=Lax", "Max-Age=3600"} <= set(parts) or "Max-Age=3599" in parts
        assert "Secure" not in parts
        secure = await http.post("/mlflow/sign-in", content=f"key={KEY}", headers=FORM | {"origin": world.url.replace("http:", "https:")})
        assert secure.headers["set-cookie"].startswith("__Host-headrace_session=")
        assert secure.headers["set-cookie"].endswith("; Secure")
    public: World = await make_world(public_urls="https://headrace.example.org")
    async with public.http(authorization="", host="headrace.example.org") as http:
        answer = await http.post("/mlflow/sign-in", content=f"key={KEY}", headers=FORM | {"origin": "https://headrace.example.org"})
        session = answer.headers["set-cookie"].partition(";")[0]
        assert answer.headers["set-cookie"].endswith("; Secure")
        path = "/mlflow/ajax-api/2.0/mlflow/runs/get"
        assert (await http.get(path, headers={"cookie": session})).status_code == 200
        # A neighbour of the domain can set the one without the prefix.
        assert (await http.get(path, headers={"cookie": session.removeprefix("__Host-")})).status_code == 401


@pytest.mark.parametrize("key", ["", "hr_no", "hrr_x.y", "%00", "é", "a" * 6000])
async def test_what_is_no_key_does_not_sign_in(world: World, key: str) -> None:
    async with world.http(authorization="") as http:
        answer = await http.post("/mlflow/sign-in", content=f"key={key}".encode(), headers=FORM | own(world))
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
        assert "not known" in answer.text


async def test_a_form_is_small_and_a_form(world: World) -> None:
    async with world.http(authorization="") as http:
        large = await http.post("/mlflow/sign-in", content=b"key=" + b"a" * 10_000, headers=FORM | own(world))
        assert large.status_code == 400
        other = await http.post("/mlflow/sign-in", content=f"key={KEY}", headers={"content-type": "text/plain"} | own(world))
        assert (other.status_code, "set-cookie" in other.headers) == (400, False)
        assert (await http.delete("/mlflow/sign-in", headers=own(world))).status_code == 404


FOREIGN: list[dict[str, str]] = [
    {},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "none"},
]


@pytest.mark.parametrize("foreign", FOREIGN)
async def test_another_site_changes_nothing_with_a_session(world: World, foreign: dict[str, str]) -> None:
    async with signed_in(world) as http:
        for method, path in (
            ("POST", "/mlflow/ajax-api/2.0/mlflow/runs/delete"),
            ("POST", "/ajax-api/2.0/mlflow/runs/delete"),
            ("PATCH", "/mlflow/ajax-api/2.0/mlflow/registered-models/update"),
            ("DELETE", "/mlflow/ajax-api/2.0/mlflow/registered-models/delete"),
            ("POST", "/mlflow/graphql"),
            ("POST", "/mlflow/sign-out"),
        ):
            answer = await http.request(method, path, content=b"{}", headers=JSON | foreign)
            assert (answer.status_code, answer.json()["error_code"]) == (403, "PERMISSION_DENIED")
        answer = await http.post("/mlflow/sign-in", content=f"key={KEY}", headers=FORM | foreign)
        assert answer.status_code == 403
    assert world.tracker.asked == world.registry.asked == []


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "text/plain; application/json"]
)
async def test_a_session_changes_nothing_but_by_json(world: World, kind: str) -> None:
    async with signed_in(world) as http:
        headers = own(world) | ({"content-type": kind} if kind else {})
        answer = await http.post("/mlflow/ajax-api/2.0/mlflow/runs/delete", content=b"{}", headers=headers)
        assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert world.tracker.asked == []


async def test_another_site_embeds_nothing_but_a_link_leads_here(world: World) -> None:
    async with signed_in(world) as http:
        path = "/mlflow/get-artifact?path=a"
        assert (await http.get(path, headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"})).status_code == 403
        answer = await http.get(path, headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})
        assert answer.status_code == 200
        assert answer.headers["x-frame-options"] == "SAMEORIGIN"
        assert answer.headers["x-content-type-options"] == "nosniff"
        # An artifact may be a page with scripts in it.
        assert answer.headers["content-security-policy"].startswith("sandbox;")


async def test_a_name_that_is_not_ours_is_not_served_to_browsers(world: World) -> None:
    async with signed_in(world) as http:
        session = f"headrace_session={http.cookies['headrace_session']}"
        for host in (
            "evil.example",
            f"evil.example:{world.server.port}",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "a@localhost",
            "",
        ):
            for path in ("/mlflow/", "/mlflow/sign-in", "/mlflow/ajax-api/2.0/mlflow/runs/get", "/ajax-api/2.0/mlflow/runs/get"):
                answer = await http.get(path, headers={"host": host, "cookie": session})
                assert answer.status_code == 403
        for host in ("localhost", "localhost:8080", "10.0.0.7:8080", "[::1]:8080"):
            assert (await http.get("/mlflow/sign-in", headers={"host": host})).status_code == 200
    async with world.http(host="evil.example") as http:
        # A program that shows a key is not somebody's browser.
        assert (await http.get("/api/2.0/mlflow/runs/get")).status_code == 200
    assert len(world.tracker.asked) == 1


@pytest.mark.parametrize("url", ["headrace.example.org", "ftp://x", "https://", "https://x/path", "https://user@x"])
def test_a_public_address_is_scheme_and_host(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        Hosts(url)


def test_a_listed_host_has_one_origin() -> None:
    hosts = Hosts("https://headrace.example.org, http://inside:8080")
    assert hosts.site({"host": "Headrace.Example.org"}).origins == {"https://headrace.example.org"}
    assert hosts.site({"host": "inside:8080"}).origins == {"http://inside:8080"}
    with pytest.raises(Forbidden):
        hosts.site({"host": "inside"})


# Sessions


class Owner:
    """A table with one key, and sessions of it at a time that the test sets."""

    def __init__(self, **key: Any) -> None:
        self.time = 1000.0
        self.access = AccessTable(lambda: self.time)
        self.revision = 0
        self.apply(**key)
        self.sessions = Sessions(self.access, b"secret", 3600, lambda: self.time)

    def apply(self, **key: Any) -> None:
        self.revision += 1
        given: dict[str, Any] = {"hash": hash_secret(KEY), "subject": "ann", "roles": frozenset({"editor"})} | key
        self.access.apply(KeySpec("key/1é", self.revision, **given))


def test_a_session_is_its_keys_owners_for_its_time() -> None:
    owner = Owner()
    session, seconds = owner.sessions.open(KEY)
    assert seconds == 3600
    caller = owner.sessions.caller(session)
    assert (caller.subject, caller.roles, caller.run_id) == ("ann", frozenset({"editor"}), None)
    owner.time += 3599
    owner.sessions.caller(session)
    owner.time += 1
    with pytest.raises(Unauthenticated):
        owner.sessions.caller(session)


def test_a_session_ends_with_its_key_and_changes_with_its_roles() -> None:
    owner = Owner()
    session, _ = owner.sessions.open(KEY)
    owner.apply(roles=frozenset({"viewer"}))
    assert owner.sessions.caller(session).roles == {"viewer"}
    owner.apply(revoked=True)
    with pytest.raises(Unauthenticated):
        owner.sessions.caller(session)
    owner.apply(hash=hash_secret("another"))
    with pytest.raises(Unauthenticated):
        owner.sessions.caller(session)


def test_a_session_is_not_longer_than_its_key() -> None:
    owner = Owner(expires_at=1060.0)
    session, seconds = owner.sessions.open(KEY)
    assert seconds == 60
    owner.time = 1060.0
    with pytest.raises(Unauthenticated):
        owner.sessions.caller(session)
    with pytest.raises(Unauthenticated):
        owner.sessions.open(KEY)


def test_a_session_cannot_be_made_up() -> None:
    owner = Owner()
    session, _ = owner.sessions.open(KEY)
    name, end, signature = session.split(".")
    wrong = [
        "", ".", "..", "a.b.c", f"{name}.{end}.", f"{name}.{int(end) + 1}.{signature}", f"{name}.{end}.{signature[:-1]}",
        f"{name}.{end}.{'0' * 64}", f"!{name}.{end}.{signature}", f"{name}.٣.{signature}", f"{name}.{end}.{signature}" + "x" * 2000,
        f"w6k=.{end}.{signature}", f"{name}.{'9' * 900}.{signature}",
    ]  # fmt: skip
    for text in wrong:
        with pytest.raises(Unauthenticated):
            owner.sessions.caller(text)
    others = Sessions(owner.access, b"another secret", 3600, lambda: owner.time)
    with pytest.raises(Unauthenticated):
        others.caller(session)
    with pytest.raises(ValueError, match="secret"):
        Sessions(owner.access, b"", 1)


def test_the_first_good_session_counts_and_names_are_exact() -> None:
    assert of_cookies({"cookie": "a=1; headrace_session=x; xheadrace_session=y; headrace_session=z"}, https=False) == ["x", "z"]
    assert of_cookies({"cookie": "headrace_session=x; __Host-headrace_session=y"}, https=True) == ["y"]
    assert of_cookies({}, https=False) == []
    assert cookie("", 0, https=False).startswith("headrace_session=; Path=/; Max-Age=0;")


def test_the_derived_secret_is_not_the_one_it_comes_from() -> None:
    assert derived_secret("") == b""
    assert derived_secret("gateway.token") not in (b"gateway.token", derived_secret("other.token"))


# The page's files


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    build = tmp_path / "build"
    (build / "static/js").mkdir(parents=True)
    (build / "index.html").write_text("<!doctype html><script src=static-files/static/js/main.c2f5f8d4.js></script>" + " " * 500)
    (build / "static/js/main.c2f5f8d4.js").write_text("let a = 1;" * 1000)
    (build / "static/logo.png").write_bytes(b"\x89PNG")
    (build.parent / "secret").write_text("not for anybody")
    (build / "link").symlink_to(build.parent / "secret")
    return build


async def test_the_page_is_served_as_it_is(make_world: MakeWorld, bundle: Path) -> None:
    world: World = await make_world(folder=str(bundle))
    async with signed_in(world) as http:
        index = await http.get("/mlflow/")
        assert index.content == (bundle / "index.html").read_bytes()
        assert index.headers["content-type"] == "text/html; charset=utf-8"
        assert index.headers["cache-control"] == "private, no-cache"
        assert index.headers["content-encoding"] == "gzip"
        assert "connect-src 'self'" in index.headers["content-security-policy"]
        again = await http.get("/mlflow/", headers={"if-none-match": index.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        script = await http.get("/mlflow/static-files/static/js/main.c2f5f8d4.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert script.headers["cache-control"] == "private, max-age=31536000, immutable"
        plain = await http.get("/mlflow/static-files/static/js/main.c2f5f8d4.js", headers={"accept-encoding": "identity"})
        assert plain.content == script.content == b"let a = 1;" * 1000
        assert "content-encoding" not in plain.headers
        image = await http.get("/mlflow/static-files/static/logo.png")
        assert (image.headers["content-type"], image.content) == ("image/png", b"\x89PNG")
        assert (await http.head("/mlflow/static-files/static/logo.png")).status_code == 200
        for path in ("link", "../secret", "%2e%2e/secret", "static", "", "static/js/none.js", "index.html/"):
            assert (await http.get(f"/mlflow/static-files/{path}")).status_code in (400, 404)
        bare = await http.get("/mlflow")
        assert (bare.status_code, bare.headers["location"]) == (308, "/mlflow/")
        assert (await http.post("/mlflow/", headers=JSON | own(world))).status_code == 404
        root = await http.get("/")  # where clients take the page to be
        assert (root.status_code, root.headers["location"]) == (307, "/mlflow/")
    async with world.http(authorization="") as http:
        assert (await http.get("/mlflow/static-files/static/logo.png")).status_code == 401


async def test_without_the_page_it_says_how_to_get_it(world: World) -> None:
    async with signed_in(world) as http:
        answer = await http.get("/mlflow/")
        assert answer.status_code == 404
        assert f"uv pip install --no-deps mlflow=={page.VERSION}" in answer.text


def test_the_page_is_found_in_a_folder_or_not_at_all(bundle: Path) -> None:
    assert page.find(str(bundle)) is not None
    with pytest.raises(FileNotFoundError):
        page.find(str(bundle / "static"))


def test_an_installed_mlflow_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    site = tmp_path / "site"
    (site / "mlflow-3.17.2.dist-info").mkdir(parents=True)
    (site / "mlflow-3.17.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 3.17.2\n")
    (site / "mlflow/server/js").mkdir(parents=True)
    (site / "mlflow/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(site))
    assert page.find("") is None
    bundle.rename(site / "mlflow/server/js/build")
    assert page.find("") is not None


def test_what_is_sent_compressed_is_the_same(bundle: Path) -> None:
    file = page._read(bundle / "static/js/main.c2f5f8d4.js")
    assert file.compressed
    assert gzip.decompress(file.content) == b"let a = 1;" * 1000
