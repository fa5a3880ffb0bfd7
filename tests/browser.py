"""A real browser for the tests and benchmarks of the explorer page."""

import shutil
from contextlib import contextmanager

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "no chromium and chromedriver (on Debian: apt-get install chromium chromium-driver)"

needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason=MISSING)


@contextmanager
def chromium(width=1440, height=900, dark=False):
    """Headless, without a network, with all that it logs kept."""
    if not (BROWSER and DRIVER):
        raise FileNotFoundError(MISSING)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "enable-unsafe-swiftshader",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.set_script_timeout(120)
        look = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [look]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield driver
    finally:
        driver.quit()


def opened(driver, page, view=""):
    """Open a page and wait until it is ready."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get("about:blank")
    driver.get(f"{page.absolute().as_uri()}{view}")
    WebDriverWait(driver, 60, 0.01).until(lambda d: d.execute_script("return document.body.dataset.ready"))
    return driver


def seconds_to_answer(driver, query, order=None):
    """From a query's last letter to the frame that shows its answer, by the browser's own clock."""
    script = """
    const [query, order, done] = arguments, input = document.getElementById("query");
    const start = performance.now();
    if (order) {
      const sort = document.getElementById("sort");
      sort.value = order;
      sort.dispatchEvent(new Event("change"));
    } else {
      input.value = query;
      input.dispatchEvent(new Event("input", {bubbles: true}));
    }
    requestAnimationFrame(() => setTimeout(() => done((performance.now() - start) / 1000)));
    """
    return driver.execute_async_script(script, query, order)
