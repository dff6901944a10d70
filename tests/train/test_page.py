"""The report, read by a browser: Chromium without a window, where there is one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from train.errors import RunError
from train.outputs.page import Comparison, Figure, Page, Table, png, write_page

HOSTILE = (
    "<script>alert(1)</script>",
    "$x_1$",
    "\"'><img src=x onerror=alert(1)>",
    "</select><b>bold</b>",
    "{{ 7 * 7 }} {% raw %}",
    "two\nlines \udcff",
    "&amp; &lt;",
)
LONG = "folder-CAMUS-512-poisson30+blur1.5-gradprom-dia+seg-lambda0.001+0.01-gateproject-max-steps1200-s12"


def image(value: float, channels: int = 1) -> bytes:
    return png(torch.full((channels, 48, 64), value))


def page(count: int = 3, channels: int = 1, source: Any = "phantom") -> Page:
    names = ["ip-only", "gradprom", *HOSTILE, LONG, *(f"strategy {number}" for number in range(count))][:count]
    rows = [[name, "28.03 [27.60, 28.46]", "+0.41 [+0.10, +0.73]", "0.012", "0.700"] for name in names]
    header = ["strategy", "PSNR (dB)", "difference to ip-only", "p (Holm)", HOSTILE[0]]
    return Page(
        title=f"A comparison {HOSTILE[0]}",
        source=source,
        verdict=["GradProm is better than IP alone.", *HOSTILE],
        facts={"data": "COVID-CT", "command": LONG, **{name: name for name in HOSTILE}},
        tables=[Table("Results", header, rows, note="Intervals: 95 %."), Table(HOSTILE[2], ["a", "b"], [])],
        figures=[Figure(image(0.2, channels), HOSTILE[0]), Figure(image(0.3, channels), "caption", HOSTILE[2])],
        comparisons=[
            Comparison(
                "Test image",
                image(0.0, channels),
                {name: image(1 - 0.04 * number, channels) for number, name in enumerate(names)},
                caption=HOSTILE[1],
            ),
            Comparison(HOSTILE[3], image(0.1), {"only": image(0.9)}, before_name=HOSTILE[2]),
        ],
    )


class TestWithoutABrowser:
    def test_one_file_that_asks_for_nothing(self, tmp_path: Path) -> None:
        write_page(tmp_path / "page.html", page())
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
        assert not re.findall(r"https?:|@import|url\(", text)
        assert all(
            source.startswith("data:image/png;base64,") for source in re.findall(r'<img[^>]* src="([^"]*)"', text)
        )
        assert text.count("<script") == 1

    def test_phantoms_are_called_so(self, tmp_path: Path) -> None:
        for source in ("real", "phantom"):
            write_page(tmp_path / "page.html", page(source=source))
            assert ("PHANTOM" in (tmp_path / "page.html").read_text(encoding="utf-8")) == (source == "phantom")

    def test_what_there_is_not_takes_no_room(self, tmp_path: Path) -> None:
        write_page(tmp_path / "page.html", Page("title", "real"))
        assert not re.findall("<(section|figure|table|h2)", (tmp_path / "page.html").read_text(encoding="utf-8"))

    def test_a_tensor_as_a_picture(self) -> None:
        import io

        import numpy as np
        from PIL import Image

        pixels = torch.tensor([[-1.0, 0.0, 0.5], [1.0, 2.0, torch.nan]])
        gray = np.asarray(Image.open(io.BytesIO(png(pixels[None]))))
        assert gray.tolist() == [[0, 0, 128], [255, 255, 0]]
        color = np.asarray(Image.open(io.BytesIO(png(torch.stack([pixels, 0 * pixels, pixels])))))
        assert color[0, 2].tolist() == [128, 0, 128]

    def test_what_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no PNG"):
            Figure(b"GIF89a", "caption")
        with pytest.raises(ValueError, match="t, b: this is no PNG"):
            Comparison("t", image(0), {"a": image(0), "b": b""})
        with pytest.raises(ValueError, match="nothing to compare"):
            Comparison("t", image(0), {})
        with pytest.raises(ValueError, match="a row of 1 cells below a header of 2"):
            Table("t", ["a", "b"], [["1"]])
        with pytest.raises(RunError, match=r"missing/page\.html cannot be written"):
            write_page(tmp_path / "missing" / "page.html", page())


# ----------------------------------------------------------------------------------------------------------------------
# In Chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Debian's Chromium and its driver. Selenium looks for no other, and downloads none, where both are named."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, program in programs.items() if program is None]
    try:
        from selenium import webdriver
    except ImportError:
        missing.append("selenium")
    if missing:
        if os.environ.get("GRADPROM_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"GRADPROM_REQUIRE_CHROMIUM=1, but there is no {', no '.join(missing)}")
        pytest.skip(f"there is no {', no '.join(missing)}")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless",
        "no-sandbox",  # root may not start it otherwise
        "disable-gpu",
        "disable-dev-shm-usage",  # containers have little shared memory
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["chromedriver"]))
    driver.set_page_load_timeout(120)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def shown(browser: Any, folder: Path, content: Page, width: int = 1200, height: int = 900, dark: bool = False) -> None:
    """Opens a report from the disk, in a window of this size."""
    write_page(folder / "page.html", content)
    browser.get_log("browser")  # forgets what was before
    browser.get_log("performance")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get((folder / "page.html").as_uri())


def pixel(browser: Any, x: float, y: float) -> tuple[int, int, int]:
    import base64
    import io

    from PIL import Image

    clip = {"x": round(x), "y": round(y), "width": 1, "height": 1, "scale": 1}
    found = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "clip": clip, "captureBeyondViewport": True}
    )
    return Image.open(io.BytesIO(base64.b64decode(found["data"]))).convert("RGB").getpixel((0, 0))


def place(browser: Any, selector: str) -> dict[str, float]:
    """Of an element, in pixels of the page."""
    return browser.execute_script(
        "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height};",
        selector,
    )


class TestInABrowser:
    @pytest.mark.parametrize(("count", "channels"), [(3, 1), (7, 3), (12, 1)])
    def test_no_error_no_request_and_all_images(self, browser: Any, tmp_path: Path, count: int, channels: int) -> None:
        import json

        shown(browser, tmp_path, page(count, channels))
        images = browser.execute_script(
            "return Promise.all([...document.images].map(image => image.decode()))"
            ".then(() => [...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight]));"
        )
        assert images == [[True, 64, 48]] * (count + 1 + 2 + 2)
        assert browser.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        # The browser's own first page asks for things too.
        own = (tmp_path / "page.html").as_uri()
        asked = {each["request"]["url"] for each in requests if each["documentURL"] == own}
        assert asked and {url.split(":")[0] for url in asked} <= {"file", "data"}
        assert [url for url in asked if url.startswith("file:")] == [own]

    def test_hostile_names_are_text(self, browser: Any, tmp_path: Path) -> None:
        content = page(9)
        shown(browser, tmp_path, content)
        body = browser.execute_script("return document.body.textContent")
        for name in HOSTILE:
            seen = name.replace("\n", r"\n").replace("\udcff", r"\xff")
            assert body.count(seen) >= 3, name
        assert browser.title == f"A comparison {HOSTILE[0]}"
        assert browser.execute_script("return document.querySelectorAll('script').length") == 1
        assert browser.execute_script("return document.querySelectorAll('main script, main b, [onerror]').length") == 0
        options = browser.execute_script("return [...document.querySelector('select').options].map(each => each.text)")
        assert options[2] == HOSTILE[0] and options[4] == HOSTILE[2] and options[5] == HOSTILE[3]
        assert browser.execute_script("return document.querySelector('figure img').alt") == HOSTILE[0]
        assert browser.get_log("browser") == []

    def test_an_injected_script_would_not_run(self, browser: Any, tmp_path: Path) -> None:
        """The policy allows the page's own script and no other, should the escaping ever fail."""
        shown(browser, tmp_path, page())
        browser.execute_script(
            "const own = document.createElement('script'); own.textContent = 'window.broken = true';"
            "document.body.append(own);"
        )
        assert browser.execute_script("return window.broken") is None

    def test_keys_and_the_mouse_move_the_boundary(self, browser: Any, tmp_path: Path) -> None:
        """Seen in the pixels: black to the left of the boundary, white to its right."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        shown(browser, tmp_path, page())
        frame = place(browser, ".frame")
        row = frame["y"] + 0.1 * frame["height"]

        def at(share: float) -> int:
            return pixel(browser, frame["x"] + share * frame["width"], row)[0]

        assert [at(0.3), at(0.47), at(0.53), at(0.7)] == [0, 0, 255, 255]
        control = browser.find_element(By.CSS_SELECTOR, ".frame input")
        browser.execute_script("document.querySelector('select').focus()")
        ActionChains(browser).send_keys(Keys.TAB).perform()
        assert browser.switch_to.active_element == control, "reached by the keyboard"
        assert (
            browser.execute_script("return getComputedStyle(document.querySelector('.frame')).outlineStyle") == "solid"
        )
        ActionChains(browser).send_keys(*[Keys.ARROW_RIGHT] * 10).perform()
        assert control.get_attribute("value") == "60" and control.get_attribute("aria-valuetext") == "60 %"
        assert [at(0.53), at(0.57), at(0.63)] == [0, 0, 255]
        ActionChains(browser).send_keys(Keys.END).perform()
        assert [at(0.03), at(0.9)] == [0, 0]
        ActionChains(browser).send_keys(Keys.HOME).perform()
        assert [at(0.03), at(0.9)] == [255, 255]
        for share in (0.25, 0.8):
            offset = round((share - 0.5) * control.size["width"])
            ActionChains(browser).move_to_element_with_offset(control, offset, 0).click().perform()
            assert int(control.get_attribute("value")) == pytest.approx(100 * share, abs=1)
            assert [at(share - 0.04), at(share + 0.04)] == [0, 255]

    def test_a_strategy_is_chosen(self, browser: Any, tmp_path: Path) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.select import Select

        content = page(7)
        shown(browser, tmp_path, content)
        frame = place(browser, ".frame")
        for number in (3, 6, 0):
            Select(browser.find_element(By.CSS_SELECTOR, "select")).select_by_index(number)
            seen = pixel(browser, frame["x"] + 0.8 * frame["width"], frame["y"] + 0.1 * frame["height"])
            assert seen[0] == round(255 * (1 - 0.04 * number))
            chosen = browser.execute_script("return document.querySelector('.chosen').textContent")
            assert chosen == list(content.comparisons[0].after)[number]
            visible = browser.execute_script(
                "return [...document.querySelector('.frame').querySelectorAll('.after')]"
                ".filter(each => each.checkVisibility()).length"
            )
            assert visible == 1

    @pytest.mark.parametrize("width", [360, 1200])
    def test_nothing_is_wider_than_the_window(self, browser: Any, tmp_path: Path, width: int) -> None:
        """Long names too: what cannot be narrower scrolls in its own place, which the keyboard reaches."""
        shown(browser, tmp_path, page(12), width=width, height=640)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return innerWidth") == width
        scrolling = browser.execute_script(
            "return [...document.querySelectorAll('.wide')].filter(each => each.scrollWidth > each.clientWidth)"
            ".map(each => [each.tabIndex, getComputedStyle(each).overflowX])"
        )
        assert all(each == [0, "auto"] for each in scrolling)
        assert bool(scrolling) == (width == 360)

    @pytest.mark.parametrize("dark", [False, True])
    def test_text_is_legible_in_light_and_in_the_dark(self, browser: Any, tmp_path: Path, dark: bool) -> None:
        """Contrast of at least 4.5, as WCAG 2.1 (1.4.3) asks, computed by its formula."""
        shown(browser, tmp_path, page(), dark=dark)
        pairs = browser.execute_script(
            """
            const behind = element => {
              for (; element; element = element.parentElement) {
                const color = getComputedStyle(element).backgroundColor;
                if (!color.endsWith(", 0)")) return color;
              }
              return "rgb(255, 255, 255)";
            };
            return ["h1", "h2", "p.phantom", ".verdict p", "dt", "dd", "th", "td", ".note",
                    "figcaption", "select", ".names"]
              .map(name => [name, document.querySelector(name)])
              .map(([name, element]) => [name, getComputedStyle(element).color, behind(element)]);
            """
        )

        def luminance(color: str) -> float:
            parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
            linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        for name, text, ground in pairs:
            low, high = sorted((luminance(text), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, text, ground)
        assert (luminance({name: ground for name, _, ground in pairs}["h1"]) < 0.1) == dark

    def test_on_paper_both_images_stand_beside_each_other(self, browser: Any, tmp_path: Path) -> None:
        shown(browser, tmp_path, page())
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        try:
            before, after = place(browser, ".frame .before"), place(browser, ".frame .after")
            assert after["x"] >= before["x"] + before["width"] and after["y"] == before["y"]
            assert after["height"] == before["height"]
            hidden = "return ['.choice', '.edge', '.frame input'].map(n => document.querySelector(n).checkVisibility())"
            assert browser.execute_script(hidden) == [False] * 3
        finally:
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})

    def test_without_scripts_it_shows_what_it_can(self, browser: Any, tmp_path: Path) -> None:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        try:
            shown(browser, tmp_path, page())
            frame = browser.find_element("css selector", ".frame").rect
        finally:
            browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        row = frame["y"] + 0.1 * frame["height"]
        assert [pixel(browser, frame["x"] + share * frame["width"], row)[0] for share in (0.3, 0.7)] == [0, 255]
