"""Reports in headless Chromium: `make test-browser`. Without a browser it fails."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from made_up_runs import made_up_run
from scsdpo.report import read_runs, write

NAMES = ("sc-sdpo", "sdpo", "grpo")


@pytest.fixture(scope="session")
def chromium():
    path = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    assert path, "no chromium: apt-get install chromium, or say where in CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Folders of three runs of 200 batches."""
    base = tmp_path_factory.mktemp("runs")
    return [
        made_up_run(base / name / "version_0", seed=seed, alarm=seed == 1)
        for seed, name in enumerate(NAMES)
    ]


@pytest.fixture(scope="session")
def report(runs):
    """Their page."""
    path = runs[0].parents[1] / "report.html"
    write(read_runs([str(run) for run in runs]), path)
    return path


@pytest.fixture
def opened(chromium, report, request):
    """Opens pages; afterwards nothing must have been asked for, and nothing said."""
    said, asked, contexts, pages = [], [], [], set()

    def open_page(path=report, *, width=1280, height=900, theme="light", place=""):
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda asking: asked.append(asking.url))
        pages.add(f"file://{path}")
        page.goto(f"file://{path}{place}")
        page.wait_for_selector('html[data-plots="ready"]')
        if page.locator("#responses").count():
            page.wait_for_selector('html[data-responses="ready"]')
        return page

    open_page.said = said
    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    # blob: is what a page made itself, for a download
    assert {url.partition("#")[0] for url in asked if not url.startswith("blob:")} == pages


def pytest_sessionfinish(session):
    """A skip is a failure: what is not run here is run nowhere."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
