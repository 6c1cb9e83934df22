"""The status page in headless Chromium: it draws, it is live, it fits a phone, and steers for who has the token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.core.events import RunState
from coordinator.status_page import StatusPage
from shardlane.metrics import Metrics
from tests import browser
from tests.browser import Page
from tests.coordinator.page_client import TOKEN, Site, site
from tests.coordinator.test_service import NAMES, cluster, until

PROGRAM = browser.find()
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason=f"there is none of {', '.join(browser.NAMES)}"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PROGRAM is not None
    with browser.browsing(PROGRAM, tmp_path_factory.mktemp("profile")) as page:
        yield page


def text(name: str) -> str:
    return f"document.getElementById('{name}').textContent"


def look(tab: Page, run: Site) -> None:
    tab.complaints.clear()
    tab.open(f"http://127.0.0.1:{run.page.port}/")
    tab.until(text("steps"), lambda found: found == "step 2 of 100")


@pytest.mark.parametrize("width", [1440, 390])
def test_it_shows_the_run_and_goes_on_with_it(tmp_path: Path, tab: Page, width: int) -> None:
    with site(tmp_path) as run:
        tab.resize(width, 900, is_dark=width == 390)
        look(tab, run)
        assert tab.ask(text("state")) == "training" and "replica 0 · lanes 0–3" in tab.ask(text("pipelines"))
        assert (
            tab.ask("document.querySelectorAll('.seat').length") == 2 and tab.ask("document.querySelectorAll('.bar').length") == 2
        )
        assert "worker-01 joined from worker1.local:50051" in tab.ask(text("events"))
        assert tab.ask("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
        run.train(2, 3, 4)
        tab.until(text("steps"), lambda found: found == "step 5 of 100")
        tab.until("document.querySelector('.loss').getAttribute('points').split(' ').length", lambda found: found == 5)
        assert tab.complaints == [], "no exception, and nothing that the policy refuses"


def test_what_the_cluster_says_is_text_and_never_markup(tmp_path: Path, tab: Page) -> None:
    with site(tmp_path) as run:
        tab.resize(1440, 900)
        run.cluster.call("Heartbeat", incarnation="worker-01", activity="<img src=x onerror=alert(1)>")
        look(tab, run)
        tab.until(text("pipelines"), lambda found: "<img src=x onerror=alert(1)>" in found)
        assert tab.ask("document.querySelectorAll('img').length") == 0 and tab.complaints == []


def press(tab: Page, token: str, action: str) -> None:
    tab.ask(f"document.getElementById('token').value = '{token}'; document.querySelector('button[value={action}]').click()")


def test_a_token_is_refused_and_accepted(tmp_path: Path, tab: Page) -> None:
    with site(tmp_path) as run:
        tab.resize(390, 844)
        look(tab, run)
        tab.until("!document.getElementById('control').hidden")
        press(tab, "wrong", "pause")
        tab.until(text("answer"), lambda found: "not the one in the coordinator's file" in found)
        assert run.cluster.service.state is RunState.TRAINING and run.attempts("wrong_token") == 1
        press(tab, TOKEN, "pause")
        tab.until(text("answer"), lambda found: found == "asked to pause")
        until(lambda: run.cluster.service.state is RunState.PAUSED)
        tab.until(text("state"), lambda found: found == "paused")
        press(tab, TOKEN, "resume")
        tab.until(text("state"), lambda found: found == "training")


def test_without_a_token_file_there_is_nothing_to_press(tmp_path: Path, tab: Page) -> None:
    with site(tmp_path, has_token=False) as run:
        look(tab, run)
        assert tab.ask("document.getElementById('control').hidden")


def test_before_anybody_is_here_it_says_who_is_missing_and_after_the_end_that_it_is_over(tmp_path: Path, tab: Page) -> None:
    page = StatusPage("127.0.0.1:0", Metrics("coordinator"))
    with cluster(tmp_path, validation__num_micro_batches=0) as run:
        page.start(run.service.coordinator)
        tab.resize(390, 844)
        tab.complaints.clear()
        tab.open(f"http://127.0.0.1:{page.port}/")
        tab.until(text("state"), lambda found: found == "gathering")
        assert tab.ask(text("why")).startswith("waiting for 2 more shards") and "none yet" in tab.ask(text("checkpoints"))
        run.register(*NAMES)
        run.beat("shard 1", 0, 1, 2, 3)
        run.checkpoint(4)
        tab.until(text("state"), lambda found: found == "finished")
        page.close()
        tab.until("!document.getElementById('lost').hidden")
        assert tab.ask(text("lost")) == "The run has finished, and its coordinator has ended."
        assert [each for each in tab.complaints if "ERR_CONNECTION_REFUSED" not in each] == []


def test_a_lost_coordinator_is_said(tmp_path: Path, tab: Page) -> None:
    with site(tmp_path) as run:
        tab.resize(390, 844)
        look(tab, run)
        assert tab.ask("document.getElementById('lost').hidden")
        run.page.close()
        tab.until("!document.getElementById('lost').hidden")
        assert "cannot be reached" in tab.ask(text("lost")) and tab.ask(text("state")) == "not reached"
        assert tab.ask(text("steps")) == "step 2 of 100", "what was known stays"
