"""A real browser for the tests of pages: Debian's Chromium or Playwright's."""

import contextlib
import os
import shutil

import pytest


@contextlib.contextmanager
def chromium():
  """One that has no windows; the test is skipped where none can be started."""
  sync_api = pytest.importorskip("playwright.sync_api")
  found = shutil.which("chromium") or shutil.which("chromium-browser")
  with sync_api.sync_playwright() as playwright:
    try:
      browser = playwright.chromium.launch(
        executable_path=found,
        # In a container there is often no user to run the sandbox as.
        args=["--no-sandbox"] if os.getuid() == 0 else [],
      )
    except sync_api.Error as error:
      pytest.skip(f"no browser can be started: {error}")
    yield browser
    browser.close()
