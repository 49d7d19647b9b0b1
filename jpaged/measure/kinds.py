# SPDX-License-Identifier: Apache-2.0
"""What a device's kernels are for, by their names and by where in the model they come from."""

import collections
import functools
import re
from collections.abc import Iterable

_MOVES = "(copy|transpose|concatenate|bitcast|slice|dynamic[-_]slice)"
# The first that matches what is known of a kernel counts: `MODULE SCOPE OPERATION KERNEL`, such as
# `jit_step jit(step)/layers_0/attention/q_proj/jit(linear)/dot_general fusion.7 nvjet_hsh_...`.
KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"paged_attention"),
    ("token write", r"write_kv"),
    ("sampler", r"\bjit_(sample|\w*beam_candidates|\w+_logits|\w+_logprobs)\b|/sample/"),
    ("copies", r"\bjit_\w+_pages\b|(?<!\S)(memcpy|memset|copy-(start|done))"),
    ("copies", rf"(?<!\S)(wrapped_|loop_|input_)?{_MOVES}(_({_MOVES}|fusion))*[._\d]*(?!\S)"),
    ("products", r"dot_general|ragged_dot|(?<!\S)(dot|custom-call|convolution)\b|gemm|gemv|nvjet"),
    ("products", r"/product/|cutlass|cublas|triton_softmax_dot|sm\d+_xmma"),
)
OTHER = "other"
ALL_KINDS = (*dict.fromkeys(kind for kind, _ in KINDS), OTHER)
# What holds other operations, which are in the trace themselves.
CONTAINER = re.compile(r"(while|call|cond|conditional|command_buffer|async-\w+)(\.|$)")

# As which compilers have products. What reads one, in a layout of its own, has its name as well.
_MULTIPLIES = re.compile(r" (convolution|custom-call|reduce)\(")
_WRAPPER = re.compile(r"jit\(.*\)|_\w+Module|while|body|cond|closed_call|branch_\d+_fun|")
_FLAGS = re.IGNORECASE
_RULES = tuple((kind, re.compile(pattern, _FLAGS)) for kind, pattern in KINDS)


@functools.cache
def kind_of(module: str, scope: str, operation: str, kernel: str) -> str:
    """The kind of a kernel, of `ALL_KINDS`; what is not known of it is empty."""
    known = f"{module} {scope} {operation} {kernel}"
    return next((kind for kind, rule in _RULES if rule.search(known)), OTHER)


class Scopes:
    """Where in the model each operation of compiled programs comes from."""

    def __init__(self, texts: Iterable[str]):
        """Reads programs. Args: their optimised HLO, as text with metadata."""
        self._programs: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
        for text in texts:
            name = text.removeprefix("HloModule ").partition(",")[0].partition("\n")[0].strip()
            self._programs[name].append(_scopes(text))

    def of(self, module: str, operations: Iterable[str]) -> dict[str, str]:
        """The scopes of one program's operations, those that are known.

        Args:
          module: the program's name, which those of several shapes share.
          operations: that it ran: the program that has most of them is meant. Kernels may be
            called like them, with underscores.
        """
        ran = set(operations)
        known = self._programs.get(module, ())
        return max(known, key=lambda scopes: len(ran & scopes.keys()), default={})


def place_of(scope: str) -> str:
    """A scope for people, the same for all layers: `layers_*/mlp/up_proj/dot_general`."""
    parts = (part for part in scope.split("/") if not _WRAPPER.fullmatch(part))
    return re.sub(r"layers_\d+", "layers_*", "/".join(parts))


def kernel_name(operation: str) -> str:
    """What compilers for GPUs call the kernel of an operation."""
    return re.sub(r"[.\-]", "_", operation)


def _scopes(text: str) -> dict[str, str]:
    """Scopes by operation; a fusion with a product inside says so."""
    scopes: dict[str, str] = {}
    calls: dict[str, str] = {}
    with_product: set[str] = set()
    computation = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").partition(" ")[0].lstrip("%")
            continue
        name, found, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        if not found:
            continue
        name = name.lstrip("%")
        scope = re.search(r'metadata=\{[^}]*op_name="([^"]*)"', rest)
        scopes[name] = scope[1] if scope else ""
        if " dot(" in rest or ("dot_general" in scopes[name] and _MULTIPLIES.search(rest)):
            with_product.add(computation)
        if called := re.search(r" fusion\(.*calls=%?([\w.\-]+)", rest):
            calls[name] = called[1]
    for name, called in calls.items():
        if called in with_product and "dot_general" not in scopes[name]:
            scopes[name] += "/dot_general"
    return scopes | {kernel_name(name): scope for name, scope in scopes.items()}
