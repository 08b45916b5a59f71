"""Pictures of reports in headless Chromium, to be looked at: `make report-shots`.

Needs `chromium` on the PATH, which no test does. Writes one picture per result, on a light page,
on a dark one, and in the width of a phone.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
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
# Chromium's own window cannot be as narrow as a phone, a frame in it can.
FRAME = '<body style="margin: 0"><iframe src="{}" style="width: 390px; height: 2000px; border: 0">'
# 0 is dark, 1 is light.
LOOKS = {"light": (1, 1100, 1500), "dark": (0, 1100, 1500), "phone": (1, 390, 2000)}


def shoot(page: Path, picture: Path, scheme: int, width: int, height: int) -> None:
    """Takes one picture."""
    subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},{height}",
            f"--screenshot={picture}",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )


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
            page, frame = Path(scratch, f"{name}.html"), Path(scratch, f"{name}-phone.html")
            write_html(page, *results)
            frame.write_text(FRAME.format(page.as_uri()))
            for look, (scheme, width, height) in LOOKS.items():
                picture = folder / f"{name}-{look}.png"
                shoot(frame if look == "phone" else page, picture, scheme, width, height)
                print(picture)


if __name__ == "__main__":
    main()
