"""A person at MLflow's page in a real Chromium: signs in, looks at what a script has logged, edits, and leaves.

Runs in the environment `browser`.
"""

from __future__ import annotations

import json
import re
import sys

from playwright.sync_api import Page, Response, expect, sync_playwright

chromium, url, key, viewer, name, experiment, first, second = sys.argv[1:]
HOME = f"{url}/mlflow/"
# What is not served, and the page does without.
OPTIONAL = re.compile(
    r"/ajax-api/2\.0/mlflow/(users/current|experiments/search-datasets)$|/ajax-api/3\.0/mlflow/assistant/(config|providers)$"
)
wrong: list[str] = []
expected: set[int] = set()
"""Statuses that the step at hand brings about on purpose."""


def answered(response: Response) -> None:
    if response.status >= 400 and response.status not in expected and not (response.status == 404 and OPTIONAL.search(response.url)):
        wrong.append(f"{response.status} {response.request.method} {response.url}")


def watched(page: Page) -> Page:
    page.set_default_timeout(20_000)
    page.on("response", answered)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    # A refused request is told in the console, too: that is counted by its answer.
    page.on(
        "console", lambda said: wrong.append(said.text) if said.type == "error" and "Failed to load resource" not in said.text else None
    )
    return page


def sign_in(page: Page, secret: str) -> None:
    page.goto(HOME)
    expect(page).to_have_url(f"{HOME}sign-in")
    page.fill("#key", secret)
    page.get_by_role("button", name="Sign in").click()


def shows(page: Page, place: str, *texts: str) -> None:
    page.goto(f"{HOME}#{place}")
    for text in texts:
        expect(page.get_by_text(text).first).to_be_visible()


with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
    context = browser.new_context(viewport={"width": 1600, "height": 1000}, base_url=url)
    expect.set_options(timeout=20_000)
    page = watched(context.new_page())

    expected.add(401)
    sign_in(page, "hr_0123456789abcdef_wrong")
    expect(page.get_by_role("alert")).to_be_visible()
    assert not context.cookies(), "a wrong key opens no session"
    expected.clear()
    sign_in(page, key)
    expect(page).to_have_url(re.compile(f"^{re.escape(HOME)}(#.*)?$"))

    shows(page, "/experiments", name)
    runs = f"/experiments/{experiment}/runs?workflowType=machine_learning"
    shows(page, runs, f"{name}-run-0", f"{name}-run-1", "2 matching runs")
    asked = page.get_by_placeholder(re.compile("metrics.rmse"))
    asked.fill("params.depth = '4'")
    asked.press("Enter")
    expect(page.get_by_text("1 matching run").first).to_be_visible()
    expect(page.get_by_text(f"{name}-run-0")).to_have_count(0)
    expected.add(400)
    asked.fill("params.depth == = 3")
    with page.expect_response(lambda response: response.url.endswith("runs/search") and response.status == 400) as refused:
        asked.press("Enter")
    told = refused.value.json()["message"]
    expect(page.get_by_text(told[:40]).first).to_be_visible()
    expected.clear()

    shows(page, f"/experiments/{experiment}/runs/{first}", f"{name}-run-0", "depth", "Finished", "v1")
    with page.expect_response(lambda response: "get-history-bulk-interval" in response.url) as history:
        shows(page, f"/experiments/{experiment}/runs/{first}/model-metrics", "loss")
    assert [point["value"] for point in history.value.json()["metrics"]] == [1.0, 0.5, 1 / 3, 0.25, 0.2]
    shows(page, f"/experiments/{experiment}/runs/{first}/artifacts", "notes")
    page.get_by_text("notes", exact=True).first.click()
    page.get_by_text("hello.txt").first.click()
    expect(page.get_by_text("hello from the script").first).to_be_visible()
    both = json.dumps([first, second]), json.dumps([experiment])
    shows(page, f"/compare-runs?runs={both[0]}&experiments={both[1]}", "Comparing 2 Runs", f"{name}-run-1", "Show diff only")
    shows(page, f"/experiments/{experiment}/models", f"{name}-model-0")
    shows(page, "/models", name)
    shows(page, f"/models/{name}", "Version 1")

    shows(page, f"/models/{name}/versions/1", "Version 1", f"{name}-run-0")
    page.get_by_role("button", name="Add", exact=True).first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("combobox").fill("blue")
    dialog.get_by_role("combobox").press("Enter")
    with page.expect_response(lambda response: response.url.endswith("registered-models/alias")) as set_alias:
        dialog.get_by_role("button", name="Save aliases").click()
    assert set_alias.value.status == 200
    tag = {"name": name, "version": "1", "key": "seen", "value": "yes"}
    asks = """async ([where, what]) =>
        (await fetch(where, {method: 'POST', headers: {'content-type': 'application/json'}, body: JSON.stringify(what)})).status"""
    where = f"{HOME}ajax-api/2.0/mlflow/model-versions/set-tag"
    assert page.evaluate(asks, [where, tag]) == 200
    foreign = context.request.post(where, data=tag, headers={"origin": "https://elsewhere.example", "sec-fetch-site": "cross-site"})
    assert foreign.status == 403, "another site's page changes nothing"

    other = browser.new_context(viewport={"width": 1600, "height": 1000})
    looking = watched(other.new_page())
    sign_in(looking, viewer)
    expect(looking).to_have_url(re.compile(f"^{re.escape(HOME)}(#.*)?$"))
    shows(looking, f"/models/{name}/versions/1", "Version 1", "blue")
    expected.add(403)
    assert looking.evaluate(asks, [where, {**tag, "value": "no"}]) == 403, "a viewer edits nothing"
    expected.clear()

    page.goto(f"{HOME}sign-out")
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(f"{HOME}sign-in")
    page.goto(HOME)
    expect(page).to_have_url(f"{HOME}sign-in")
    browser.close()

assert not wrong, "\n".join(wrong)
