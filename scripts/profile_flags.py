# SPDX-License-Identifier: Apache-2.0
"""Flags of a profile: where the time of some steps goes."""

import contextlib
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags

from jpaged import Engine

if typing.TYPE_CHECKING:
    from jpaged.measure.profile import ProfileConfig

# As in `flags`.
flags.disclaim_key_flags()


def define_profile_flags() -> None:
    """Defines the flags of `ProfileConfig`."""
    flags.DEFINE_string(
        "profile",
        None,
        "Directory for a trace of some steps and a page that says where their time goes, beside "
        "what reading weights and pages once would take. The page goes to standard error too.",
    )
    flags.DEFINE_integer("profile_steps", 40, "Steps of the profile.", lower_bound=1)
    flags.DEFINE_enum(
        "profile_start",
        "decode",
        ["decode", "first"],
        "decode begins the profile after a step that did nothing but decode and compiled nothing, "
        "first with the first step, whatever it compiles.",
    )


def profile_config_from_flags() -> "ProfileConfig | None":
    """What to profile; None for nothing. The directory is there then.

    Raises:
      app.UsageError: if it cannot be written.
    """
    values = flags.FLAGS
    if values.profile is None:
        return None
    from jpaged.measure.profile import ProfileConfig  # jax, which other runs import later

    try:
        return ProfileConfig(
            directory=values.profile, steps=values.profile_steps, start=values.profile_start
        )
    except ValueError as e:
        raise app.UsageError(f"--{e}") from e


@contextlib.contextmanager
def profiled(engine: Engine, config: "ProfileConfig | None") -> Iterator[Callable[[], None]]:
    """Profiles what an engine does meanwhile, and shows the page at the end.

    Yields:
      What is to be called after each step.
    """
    if config is None:
        yield lambda: None
        return
    from jpaged.measure.profile import Profile

    with Profile(engine, config) as profile:
        yield profile.look
    show_profile(profile.found)


def show_profile(found: dict[str, Any] | None) -> None:
    """Writes the page to standard error; None if nothing was traced."""
    from jpaged.measure.breakdown import draw

    if found is not None:
        print(f"{draw(found)}profile: {found['trace']}", file=sys.stderr)
        return
    print(
        "profile: no step was traced, as the run was over before one began; generate more tokens, "
        "or begin with --profile_start=first",
        file=sys.stderr,
    )
