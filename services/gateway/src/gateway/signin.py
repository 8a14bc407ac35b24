"""The pages by which a person signs in to MLflow's page with an API key, and out again: two forms that need no script."""

from __future__ import annotations

import base64
import hashlib
import html
from string import Template

from starlette.responses import HTMLResponse, Response

from gateway.page import VERSION

MAX_FORM_BYTES = 8 * 1024

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:26rem;margin:12vh auto;padding:0 1rem;color:#1c2733}"
    "input,button{font:inherit;padding:.5rem .7rem;box-sizing:border-box;width:100%;margin:.3rem 0}"
    "button{background:#0b5cad;color:#fff;border:0;border-radius:4px}.wrong{color:#a11}code{background:#eef1f4;padding:.1rem .3rem}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"

_PAGE = Template(
    f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Headrace: $title</title>"
    f"<style>{_STYLE}</style><h1>$title</h1>$body</html>"
)
_FORM = Template(
    "$wrong<form method=post action=/mlflow/sign-in><label for=key>API key</label>"
    "<input id=key name=key type=password autocomplete=current-password autofocus required>"
    "<button>Sign in</button></form><p>An admin makes keys by <code>headrace keys create</code>.</p>"
)


def form(wrong: str = "") -> Response:
    """The form to sign in; `wrong` says why it is shown again."""
    told = f"<p class=wrong role=alert>{html.escape(wrong)}</p>" if wrong else ""
    return _answer("Sign in", _FORM.substitute(wrong=told), 401 if wrong else 200)


def leaving() -> Response:
    """The form to sign out."""
    return _answer("Sign out", "<form method=post action=/mlflow/sign-out><button>Sign out</button></form>", 200)


def no_page() -> Response:
    """What stands in the place of MLflow's page where it is not installed."""
    command = f"uv pip install --no-deps mlflow=={VERSION}"
    body = (
        "<p>The API is served here. MLflow's page itself is not installed beside the gateway.</p>"
        f"<p>Install it without its dependencies, which the page does not need: <code>{command}</code>, and start the gateway again.</p>"
    )
    return _answer("No page", body, 404)


def _answer(title: str, body: str, status: int) -> Response:
    headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
    return HTMLResponse(_PAGE.substitute(title=title, body=body), status, headers)
