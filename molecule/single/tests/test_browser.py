"""The users' journeys in a real browser over HTTPS: a learner with a phone, a reviewer at a desk.

What the browser shows is kept in `$EVENKEEL_STATE/screenshots/`, for people to look at.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import testinfra
from conftest import STATE, secret
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import WebDriverWait

SCREENSHOTS = STATE / "screenshots"
PHONE = {"width": 390, "height": 844, "pixelRatio": 2.0}
SOURCE = r"\documentclass{article}\begin{document}Written on a phone.\end{document}"


class Person:
    """Somebody with a browser."""

    def __init__(self, url: str, phone: bool) -> None:
        options = ChromeOptions()
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
            "--no-first-run", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
        ):  # fmt: skip
            options.add_argument(argument)
        # The other tests verify the platform's certificate against its CA; a browser would need that CA in its own store.
        options.accept_insecure_certs = True
        if phone:
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": PHONE})
        self.driver = Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        self.driver.set_page_load_timeout(60)
        self.url = url

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    def log_in(self, name: str, password: str) -> None:
        self.open("/login")
        self.fill("username", name)
        self.fill("password", password)
        self.press("Sign in")

    def fill(self, field: str, text: str) -> None:
        element = self.driver.find_element(By.NAME, field)
        if element.get_attribute("type") != "file":
            element.clear()
        element.send_keys(text)

    def press(self, label: str) -> None:
        """Press a button or follow a link by what stands on it."""
        found = self.driver.find_elements(By.XPATH, f"//button[normalize-space()={label!r}] | //a[normalize-space()={label!r}]")
        assert found, f"{label!r} is not on {self.driver.current_url}: {self.text()[:500]}"
        self.click(found[0])

    def click(self, element: WebElement) -> None:
        """Click what leads to another page, and wait for that."""
        page = self.driver.find_element(By.TAG_NAME, "html")
        element.click()
        # while the page is being left, the driver also has other words for that
        WebDriverWait(self.driver, 60, ignored_exceptions=(WebDriverException,)).until(staleness_of(page))

    def text(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "body").text

    def until(self, what: str, limit_seconds: float = 120) -> None:
        """Wait until a text is on the page, which renews itself while something is pending."""

        def shown(_: Chrome) -> bool:
            return what in self.text()

        WebDriverWait(self.driver, limit_seconds, ignored_exceptions=[Exception]).until(shown, f"{what!r} in {self.text()[:800]}")

    def keep(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))
        wider = self.driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider <= 0, f"{name}: the page is {wider} pixels wider than the screen"


@pytest.fixture
def person(url: str) -> Iterator[Callable[..., Person]]:
    people: list[Person] = []

    def make(*, phone: bool = False) -> Person:
        people.append(Person(url, phone))
        return people[-1]

    yield make
    for one in people:
        one.driver.quit()


@pytest.fixture
def learner(host: testinfra.host.Host) -> str:
    """A new person whose password is the demo user's."""
    # a host that has just booted shows the page for bad moments until its web process has started
    host.check_output("evenkeel-health wait --timeout 240 proxy drydock-web drydock-worker-latex drydock-worker-export")
    name = f"learner-{uuid.uuid4().hex[:8]}"
    host.check_output(f"drydock-run drydock ensure_user --username {name} --password-env DRYDOCK_DEMO_PASSWORD")
    return name


def test_o1_journeys_of_a_learner_and_a_reviewer(person: Callable[..., Person], learner: str, tmp_path: Path) -> None:
    """Log in, open a unit, answer it, submit a photo and have it reviewed, render a PDF, export."""
    phone = person(phone=True)
    phone.open("/units/")
    assert urlsplit(phone.driver.current_url).path == "/login", "a stranger is asked to sign in"
    phone.keep("phone-login")
    phone.log_in(learner, secret("app_demo_password"))
    phone.keep("phone-start")

    phone.open("/units/")
    phone.keep("phone-units")
    phone.press("The lab notebook")
    phone.fill("answer", "two")
    phone.press("Answer")
    assert "is not right" in phone.text()
    phone.fill("answer", "one")
    phone.press("Answer")
    assert "is right" in phone.text()
    picture = tmp_path / "notebook.png"
    phone.driver.save_screenshot(str(picture))
    phone.fill("photo", str(picture))
    phone.press("Send the photo")
    phone.until("A reviewer will look at it")
    phone.keep("phone-unit")

    desk = person()
    desk.log_in("reviewer", secret("app_reviewer_password"))
    desk.open("/review/")
    card = desk.driver.find_element(By.XPATH, f"//*[contains(@alt, 'Photo by {learner}')]/ancestor::section[1]")
    image = card.find_element(By.TAG_NAME, "img")
    WebDriverWait(desk.driver, 30).until(lambda driver: driver.execute_script("return arguments[0].naturalWidth", image) > 0)
    desk.keep("desk-review")
    desk.click(card.find_element(By.XPATH, ".//button[@value='approved']"))
    phone.driver.refresh()
    phone.until("Approved by reviewer")

    phone.open("/documents/new")
    phone.fill("title", "From a phone")
    phone.fill("source", SOURCE)
    phone.press("Compile")
    phone.until("Open the PDF")
    phone.keep("phone-document")
    assert phone.driver.find_element(By.CSS_SELECTOR, "nav [aria-current=page]").text == "Documents"

    phone.open("/exports/")
    phone.press("Export")
    phone.until("Download")
    phone.keep("phone-export")

    desk.open("/operations/jobs/")
    desk.keep("desk-jobs")
    assert "latex.compile" in desk.text()
    for name in ("units", "documents", "uploads", "exports"):
        desk.open(f"/{name}/")
        desk.keep(f"desk-{name}")
