# SPDX-License-Identifier: Apache-2.0
"""Tools for kernels: what compilers say of them, and how fast they are on this device."""
