"""Takes pictures of reports in headless Chromium, for a person to look at: `make report-shots`.

It needs `chromium` on the PATH. Every result is shown in the widths of a phone, a tablet and a
desktop, and once on a dark page.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import reports

from virtualbatch.report import write_html

RESULTS = {
    "demo": [reports.demo()],
    "plan": [reports.plan()],
    "certificate": [reports.certificate()],
    "inexact": [reports.inexact()],
    "noise": [reports.noise(), reports.batch_advice()],
}
# Light and dark, and the widths of a phone, a tablet and a desktop. 0 is dark, 1 is light.
LOOKS = {"380": (1, 380), "800": (1, 800), "1400": (1, 1400), "1400-dark": (0, 1400)}
HEIGHT = 1900
# Chromium's own window cannot be as narrow as a phone, but a frame in it can.
FRAME = (
    '<body style="margin: 0"><iframe src="{}" '
    f'style="width: {{}}px; height: {HEIGHT}px; border: 0">'
)

# Only the measured copy of a page has this script; reports have none.
MEASURE = """<script>
const root = document.documentElement;
parent.postMessage(`width ${innerWidth} overflow ${root.scrollWidth - root.clientWidth};`, "*");
</script>"""
COLLECT = "onmessage = (event) => document.body.append(event.data);"


def chromium(page: Path, *options: str) -> str:
    """Opens a page in headless Chromium.

    Args:
        page: to open.
        *options: of the command.

    Returns:
        What Chromium printed.
    """
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def shoot(page: Path, picture: Path, scheme: int, width: int) -> None:
    """Takes one picture of a page in a frame of this width."""
    frame = page.with_suffix(f".{width}.html")
    frame.write_text(FRAME.format(page.as_uri(), width))
    chromium(
        frame,
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},{HEIGHT}",
        f"--screenshot={picture}",
    )


def wider_than_its_window(page: Path, widths: Sequence[int]) -> dict[int, int]:
    """By how many pixels a page is wider than its window, for each width of the window.

    Args:
        page: to open.
        widths: of the window, in pixels.
    """
    measured = page.with_suffix(".measured.html")
    measured.write_text(page.read_text(encoding="utf-8") + MEASURE, encoding="utf-8")
    frames = "".join(
        f'<iframe src="{measured.as_uri()}" style="width: {width}px; height: 900px; border: 0">'
        "</iframe>"
        for width in widths
    )
    frame = page.with_suffix(".frames.html")
    frame.write_text(f"<body><script>{COLLECT}</script>{frames}")
    found = re.findall(
        r"width (\d+) overflow (\d+);", chromium(frame, "--dump-dom", "--virtual-time-budget=9000")
    )
    return {int(width): int(overflow) for width, overflow in found}


def main() -> None:
    """Writes the pictures into a folder and names them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    if shutil.which("chromium") is None:
        raise SystemExit("Pictures need chromium. Got none on the PATH. Run: apt install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, results in RESULTS.items():
            page = Path(scratch, f"{name}.html")
            write_html(page, *results)
            for look, (scheme, width) in LOOKS.items():
                picture = folder / f"{name}-{look}.png"
                shoot(page, picture, scheme, width)
                print(picture)


if __name__ == "__main__":
    main()
