"""Take the documentation's screenshot of the demo.

timm-tresnet demo --port 7860 &
python hub/screenshot.py http://127.0.0.1:7860 docs/demo.webp

Needs `pip install playwright` and Chromium, such as Debian's.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from timm_tresnet.utils.files import atomic_write
from timm_tresnet.utils.images import SAMPLES

_SIZE = {"width": 1100, "height": 840}


def take_screenshot(url: str) -> Image.Image:
    """Open a running demo, upload a photograph of the package, and return the page's picture."""
    with sync_playwright() as driver:
        program = shutil.which("chromium") or driver.chromium.executable_path
        with driver.chromium.launch(executable_path=program, args=["--no-sandbox"]) as browser:
            page = browser.new_page(viewport=_SIZE)
            page.goto(url)
            for name in ("cat", "deer"):  # the first photograph is slow, and the page shows the time
                page.locator("#photograph input[type=file]").set_input_files(SAMPLES / f"{name}.jpg")
                page.locator("#first-note").get_by_text(f"map of “{name}”").wait_for()
                page.locator("#photograph button[aria-label=Clear]").wait_for()
                if name == "cat":
                    page.locator("#photograph button[aria-label=Clear]").click()
            page.locator("#first-picture img").evaluate("image => image.decode()")
            page.wait_for_timeout(1000)  # bars grow
            return Image.open(io.BytesIO(page.screenshot()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take the documentation's screenshot of the demo.")
    parser.add_argument("url", help="address of the demo")
    parser.add_argument("file", type=Path, help="image to write")
    arguments = parser.parse_args()
    with atomic_write(arguments.file) as unfinished:
        take_screenshot(arguments.url).convert("RGB").save(unfinished, quality=80, method=6)
