"""The page for people, driven in a real headless Chromium. PAGE_SCREENSHOT=path.png keeps a picture of it."""

import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from page_models import CLASSES, EXAMPLE, SCRIPT, register
from parts import need
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait
from servers import serving

# The page's requests, as a test may read them: [path, body, Authorization].
RECORD = """window.sent = []; const real = window.fetch; window.fetch = (path, options) => {
  sent.push([path, options?.body, options?.headers?.Authorization]); return real(path, options); };"""


class Page:
    """What a person sees and does."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, width: int = 900, height: int = 600, dark: bool = False) -> "Page":
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)
        return self

    def __getitem__(self, name: str) -> WebElement:
        """The element with this id, once it can be seen."""
        element = self.driver.find_element(By.ID, name)
        self.until(element.is_displayed, f"#{name} is not shown")
        return element

    def until(self, true: Callable[[], object], message: str) -> None:
        WebDriverWait(self.driver, 20, 0.02).until(lambda _: true(), message)

    def shows(self, name: str) -> bool:
        return self.driver.find_element(By.ID, name).is_displayed()

    def says(self, name: str, text: str) -> None:
        element = self.driver.find_element(By.ID, name)
        self.until(lambda: text in element.text, f"#{name} does not say {text!r}")

    def field(self, column: str) -> WebElement:
        labels = self["fields"].find_elements(By.TAG_NAME, "label")
        (label,) = [label for label in labels if label.find_element(By.TAG_NAME, "span").text == column]
        return label.find_element(By.CSS_SELECTOR, "input, select, textarea")

    def pixels(self) -> list[float]:
        return self.script("return fields.map((field) => Number(field.value))")

    def type(self, column: str, text: str) -> None:
        self.field(column).clear()
        self.field(column).send_keys(text)

    def predict(self) -> None:
        self["predict"].click()
        self.until(self["predict"].is_enabled, "no answer comes")

    def draw(self, *lines: list[tuple[float, float]]) -> None:
        """Draw lines through points given in shares of the frame's width and height, with the mouse."""
        pad = self["pad"]
        size = pad.size["width"]
        hand = ActionChains(self.driver, duration=10)
        for (x, y), *rest in lines:
            hand.move_to_element_with_offset(pad, int((x - 0.5) * size), int((y - 0.5) * size)).click_and_hold()
            for x, y in rest:
                hand.move_to_element_with_offset(pad, int((x - 0.5) * size), int((y - 0.5) * size))
            hand.release()
        hand.perform()

    def sent(self, path: str) -> list[Any]:
        """The bodies sent to this path since the page was opened."""
        return [json.loads(body) for to, body, _ in self.script("return sent") if to.split("?")[0] == path and body]

    def row(self) -> list[Any]:
        return self.sent("/invocations")[-1]["dataframe_split"]["data"][0]

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = need("chromium", "chromium")
    quiet = "quic background-networking component-update sync gpu"
    for flag in ("headless", "no-sandbox", "no-first-run", *(f"disable-{what}" for what in quiet.split())):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(need("chromedriver", "chromium-driver")))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": RECORD})
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: webdriver.Chrome) -> Iterator[Page]:
    driver.get_log("browser")
    yield Page(driver)
    # Refused answers are logged as the network's; errors of the script and of the content security policy are not.
    lines = driver.get_log("browser")
    assert [line for line in lines if line["level"] == "SEVERE" and line["source"] != "network"] == []


@pytest.fixture(scope="module")
def servers(project: Project) -> Iterator[dict[str, str]]:
    """The addresses at which "table" and "digits" of page_models are served."""
    kinds, urls = ("table", "digits"), {}
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        servers = [serving(project, f"registered_model_name={kind}") for kind in kinds]
        started = threads.map(stack.enter_context, servers)  # both at the same time
        for kind in kinds:
            register(project, kind)
        for kind, served in zip(kinds, started, strict=True):
            served.wait()
            urls[kind] = served.url
        yield urls


@pytest.fixture
def table(servers: dict[str, str]) -> str:
    return servers["table"]


@pytest.fixture
def digits(servers: dict[str, str]) -> str:
    return servers["digits"]


def test_fill_predict_and_say_right(page: Page, table: str):
    page.open(table)
    page.predict()
    assert page.row() == list(EXAMPLE.values())
    page.type("area", "1.5e2")
    page.type("rooms", "9007199254740993")  # more than a JavaScript number holds
    page.type("\"quoted\", 'too' &amp; <b>", "12")
    Select(page.field("été 東京")).select_by_visible_text("(missing)")
    page.type("built", "")
    assert not page.shows("feedback"), "the answer shown belongs to other inputs"
    page.predict()
    assert page.row() == [150, 9007199254740993, SCRIPT, 12, None, None, None]
    assert page["by"].text == "by version 1"
    assert page["bars"].text.count(" %") == len(CLASSES)
    page["right"].click()
    page.says("state", "accepted")
    (feedback,) = page.sent("/feedback")
    assert feedback["label"] == SCRIPT and feedback["source"] == "page" and "comment" not in feedback


def test_correct_with_another_label_where_names_look_like_html(page: Page, table: str):
    page.open(table)
    page.predict()
    names = [span.text for span in page["fields"].find_elements(By.CSS_SELECTOR, "label > span")]
    assert names == list(EXAMPLE) and page["answer"].text == SCRIPT
    classes = [option.get_property("textContent") for option in page["label"].find_elements(By.TAG_NAME, "option")]
    assert classes == ["choose", '""', *CLASSES[1:]]
    assert page.driver.title.endswith("version 1") and len(page.driver.find_elements(By.TAG_NAME, "script")) == 1
    page["comment"].send_keys("looked <twice>")
    Select(page["label"].find_element(By.TAG_NAME, "select")).select_by_visible_text(CLASSES[3])
    page["label"].find_element(By.XPATH, "following::button[1]").click()
    page.says("state", "accepted")
    (feedback,) = page.sent("/feedback")
    assert (feedback["label"], feedback["source"], feedback["comment"]) == (CLASSES[3], "page", "looked <twice>")


def test_what_the_server_refuses_is_shown(page: Page, table: str):
    page.open(table)
    page.type("rooms", "2.5")
    page["predict"].click()
    assert page.sent("/invocations") == [], "the browser itself refuses half a room"
    page.type("rooms", "")
    page["predict"].click()
    page.says("problem", "rooms")
    page.driver.set_network_conditions(offline=True, latency=0, throughput=-1)
    try:
        page.says("trouble", "does not answer")
    finally:
        page.driver.delete_network_conditions()
    page.until(lambda: not page.shows("trouble"), "it does not see the server again")


def test_nothing_goes_elsewhere(page: Page, table: str):
    page.open(table)
    page["example"]
    there = "http://127.0.0.1:9/"
    page.script(f"new Image().src = '{there}'; fetch('{there}').catch(() => {{ document.title = 'no' }})")
    page.until(lambda: page.driver.title == "no", "fetch does not fail")
    lines = [line["message"] for line in page.driver.get_log("browser") if "Content Security Policy" in line["message"]]
    assert any("img-src" in line for line in lines) and any("connect-src" in line for line in lines)


def test_the_keyboard_is_enough(page: Page, table: str):
    page.open(table)
    page.field("area").send_keys(Keys.ENTER)
    assert page["right"].is_displayed()
    for _ in range(30):
        focused = page.driver.switch_to.active_element
        if focused.get_attribute("id") == "right":
            break
        focused.send_keys(Keys.TAB)
    page.driver.switch_to.active_element.send_keys(Keys.SPACE)
    page.says("state", "accepted")


def test_draw_a_digit(page: Page, digits: str):
    page.open(digits)
    angles = [math.radians(15 * i) for i in range(25)]
    page.draw([(0.5 + 0.24 * math.sin(angle), 0.5 - 0.4 * math.cos(angle)) for angle in angles])
    page.predict()
    image = page.row()
    assert all(value in range(17) for value in image), "each counts the inked ones of 4 x 4 dots"
    assert image[0] == image[7] == image[56] == image[63] == 0 and image[3 * 8 + 2] > 8 > image[3 * 8 + 4]
    assert page["answer"].text == "0"
    if path := os.environ.get("PAGE_SCREENSHOT"):
        page.driver.save_screenshot(str(Path(path)))
    page["right"].click()
    page.says("state", "accepted")
    assert page.sent("/feedback")[0]["label"] == 0
    page.draw([(0.5, 0.1), (0.5, 0.9)], [(0.3, 0.9), (0.7, 0.9)])  # anew, of two strokes
    page.says("state", "predict again")
    now = page.pixels()
    assert now[3 * 8 + 2] == 0 and now[7 * 8 + 3] > 8
    page["clear"].click()
    assert set(page.pixels()) == {0}


def test_a_server_with_tokens_its_first_model_and_the_next_version(page: Page, project: Project):
    tokens = {"SERVE_PREDICT_TOKEN": "p", "SERVE_FEEDBACK_TOKEN": "f"}
    with serving(project, "registered_model_name=houses", **tokens) as served:
        page.open(served.url)
        page["tokenText"].send_keys("wrong", Keys.ENTER)
        page.says("token", "Not that one")
        page["tokenText"].send_keys("p", Keys.ENTER)
        page.says("trouble", "No model yet: ")
        assert (
            f"serve: waiting, houses has no champion: set the alias on a version in the registry; the registry is {project.uri}\n"
            in served.lines
        )
        register(project, "houses")
        page.type("x7", "1000")
        page.predict()
        assert not page.shows("trouble")
        before = page["answer"].text
        label = page["label"].find_element(By.TAG_NAME, "input")
        label.send_keys("12.5", Keys.ENTER)
        page.says("token", "feedback")
        page["tokenText"].send_keys("f", Keys.ENTER)
        page.says("state", "accepted")
        assert page.sent("/feedback")[-1]["label"] == 12.5
        assert page.script("return sent.findLast(([path]) => path === '/feedback')[2]") == "Bearer f"
        assert page["fields"].size["height"] < 400, "many columns scroll"
        register(project, "houses")
        page.says("notice", "Version 2 serves now, in place of 1")
        assert "serve: version 2 of houses answers\n" in served.lines
        assert page.field("x7").get_property("value") == "1000"
        assert page["by"].text == "by version 1" and page["answer"].text == before
        page.predict()
        assert page["by"].text == "by version 2"
        page.driver.refresh()
        page.predict()
        assert not page.shows("token"), "the tab remembers its tokens"


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(page: Page, table: str, digits: str, dark: bool):
    for url in (table, digits):
        page.open(url, 360, 740, dark)
        page.predict()
        assert page.script("return document.documentElement.scrollWidth") <= 360
    paper = page.script("return getComputedStyle(document.documentElement).backgroundColor")
    assert (int(paper.split("(")[1].split(",")[0]) < 128) == dark
