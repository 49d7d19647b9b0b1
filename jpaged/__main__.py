# SPDX-License-Identifier: Apache-2.0
"""`python -m jpaged`, which is the command `jpaged`."""

from jpaged.cli import main

main()
