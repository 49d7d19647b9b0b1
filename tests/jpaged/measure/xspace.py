# SPDX-License-Identifier: Apache-2.0
"""Traces written by hand, as jax's profiler gives them."""

import jax


def profile_data(planes):
    """A `jax.profiler.ProfileData`.

    Args:
      planes: by name, lines by name, each a list of (name, start_us, end_us, stats).
    """
    text = "".join(_plane(name, lines) for name, lines in planes.items())
    serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    return jax.profiler.ProfileData.from_serialized_xspace(serialized)


def _plane(plane, lines):
    names = {name for events in lines.values() for name, *_ in events}
    stats = {key for events in lines.values() for *_, own in events for key in own}
    ids = {name: i for i, name in enumerate(sorted(names | stats), 1)}
    text = "".join(
        f'lines {{ id: {i} name: "{line}" {"".join(_event(ids, *event) for event in events)} }}\n'
        for i, (line, events) in enumerate(lines.items(), 1)
    )
    for kind, own in (("event_metadata", names), ("stat_metadata", stats)):
        for name in own:
            value = f'{{ id: {ids[name]} name: "{name}" }}'
            text += f"{kind} {{ key: {ids[name]} value {value} }}\n"
    return f'planes {{ name: "{plane}" {text} }}\n'


def _event(ids, name, start_us, end_us, stats):
    shown = "".join(
        f'stats {{ metadata_id: {ids[key]} str_value: "{value}" }}' for key, value in stats.items()
    )
    times = f"offset_ps: {round(start_us * 1e6)} duration_ps: {round((end_us - start_us) * 1e6)}"
    return f"events {{ metadata_id: {ids[name]} {times} {shown} }}\n"
