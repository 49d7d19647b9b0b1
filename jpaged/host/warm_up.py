# SPDX-License-Identifier: Apache-2.0
"""What there is to compile ahead of need, for shapes of steps and parameters of requests."""

import dataclasses
from collections.abc import Collection, Iterable

import numpy as np

from jpaged.host.batch import BeamBatch, ShapeBuckets, StepShape
from jpaged.host.checks import Rule, at_least, checked, instance_of, shown
from jpaged.host.growth import growth_of
from jpaged.host.logits_processors import LogitsProcessors
from jpaged.host.logprobs import likeliest_counts
from jpaged.host.params import LogprobsMode, SamplingParams

# What a plan has for parameters: how people call it, and which parameters it depends on.
_ASKED = {
    "likeliest": ("likeliest tokens", ("logprobs", "prompt_logprobs")),
    "modes": ("likeliest tokens of other modes than raw", ("logprobs", "logprobs_mode")),
    "scores": ("scores", ("prompt_logprobs",)),
    "beams": ("(beams, candidates)", ("beam_width", "stop_token_ids", "ignore_eos")),
    "processors": (
        "entries in a list of what changes logits",
        (
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
            *("sequence_bias", "min_tokens", "suppress_tokens", "bad_words_ids"),
            *("allowed_token_ids", "max_tokens"),
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class WarmUpPlan:
    """What is compiled ahead of need: steps, and what requests ask of each beside tokens.

    Attributes:
      shapes: of steps, the first is needed first.
      bursts: of these, those that bursts have too, where there are any.
      likeliest: numbers of likeliest tokens that are reported.
      modes: likewise, with log-probabilities that are not the model's.
      scores: tokens that are given and scored: one entry if there are any.
      beams: widths and numbers of candidates of searches.
      processors: widths of the lists of what changes logits.
    """

    shapes: tuple[StepShape, ...] = ()
    bursts: tuple[StepShape, ...] = ()
    likeliest: tuple[int, ...] = ()
    modes: tuple[int, ...] = ()
    scores: tuple[str, ...] = ()
    beams: tuple[tuple[int, int], ...] = ()
    processors: tuple[int, ...] = ()

    def __or__(self, other: "WarmUpPlan") -> "WarmUpPlan":
        """What is in one of them: all shapes with all that is asked of steps."""
        names = [field.name for field in dataclasses.fields(self)]
        both = ((*getattr(self, name), *getattr(other, name)) for name in names)
        return WarmUpPlan(*(tuple(dict.fromkeys(entries)) for entries in both))

    def check(self, params: SamplingParams, own: "WarmUpPlan") -> None:
        """Refuses parameters whose steps call what is not here.

        Args:
          params: of a request, resolved.
          own: what `asked_by` says of them.

        Raises:
          ValueError: naming parameters, what they need, and what there is.
        """
        for field, (what, names) in _ASKED.items():
            has = getattr(self, field)
            if not (missing := [entry for entry in getattr(own, field) if entry not in has]):
                continue
            neutral = SamplingParams().resolve()
            values = ((name, getattr(params, name)) for name in names)
            asked = [f"{n}={shown(v)}" for n, v in values if v not in (None, getattr(neutral, n))]
            raise ValueError(
                f"strict_shapes: {', '.join(asked)} needs programs that are not compiled ({what}: "
                f"{missing[0]}; compiled: {', '.join(map(str, has)) or 'none'}); give such "
                "parameters to Engine.warm_up(params=), or do without strict_shapes"
            )


def asked_by(
    params: Iterable[SamplingParams],
    vocab_size: int,
    eos_token_ids: Collection[int],
    max_model_len: int,
) -> WarmUpPlan:
    """What steps of requests call beside what all steps do, whichever of them are in a step.

    Args:
      params: of the requests, resolved.
      vocab_size: the model's.
      eos_token_ids: likewise.
      max_model_len: most tokens of a request.
    """
    plan = WarmUpPlan()
    for own in params:
        raw = own.logprobs_mode == LogprobsMode.RAW
        reported = max((own.logprobs or 0) if raw else 0, own.prompt_logprobs or 0)
        # None and one share a program.
        drawn = 0 if raw or own.logprobs is None else max(own.logprobs, 1)
        processors = LogitsProcessors.of(own, (), vocab_size)
        most = min(own.max_tokens or 0, max_model_len)
        plan |= WarmUpPlan(
            likeliest=tuple(likeliest_counts(reported, vocab_size)),
            modes=tuple(likeliest_counts(drawn, vocab_size)),
            scores=() if own.prompt_logprobs is None else ("given tokens",),
            beams=() if own.beam_width is None else (_search_of(own, eos_token_ids),),
            processors=tuple(processors.widths(most)) if processors else (),
        )
    return plan


def warm_up_plan(
    buckets: ShapeBuckets,
    vocab_size: int,
    eos_token_ids: Collection[int],
    defaults: SamplingParams,
    max_model_len: int,
    shapes: Collection[StepShape] | None = None,
    num_logprobs: int = 0,
    params: Collection[SamplingParams] = (),
) -> WarmUpPlan:
    """What there is to compile ahead of need; see `Engine.warm_up`.

    Args:
      buckets: the shapes that steps have.
      vocab_size: the model's.
      eos_token_ids: likewise.
      defaults: the model's own sampling parameters.
      max_model_len: most tokens of a request.
      shapes: as in `Engine.warm_up`, like the rest.
      num_logprobs: likewise.
      params: likewise.

    Raises:
      ValueError: if one of the last three cannot be.
    """
    most = Rule(f"at most {vocab_size}, the vocabulary", vocab_size.__ge__)
    num_logprobs = checked("num_logprobs", num_logprobs, int, (*at_least(0), most))
    shapes = buckets.all_shapes() if shapes is None else shapes
    possible = {*buckets.all_shapes(), *dataclasses.replace(buckets, given=()).all_shapes()}
    for name, value in (("shapes", shapes), ("params", params)):
        if isinstance(value, str) or not isinstance(value, Collection):
            raise ValueError(f"{name}={shown(value)} must be a list")
    for shape in shapes:
        if instance_of("shapes", shape, StepShape) not in possible:
            raise ValueError(f"shapes={shape} must be shapes that steps of this engine have")
    given = [instance_of("params", own, SamplingParams) for own in params]
    # What the model asks for, whoever says nothing else does too.
    given += [SamplingParams(), SamplingParams(logprobs=num_logprobs)]
    resolved = [own.resolve(defaults, max_model_len) for own in dict.fromkeys(given)]
    limits = {
        "beam_width": buckets.max_beams,
        "logprobs": vocab_size,
        "prompt_logprobs": vocab_size,
    }
    for own in resolved:  # as a request of them would be
        for name, limit in limits.items():
            if (getattr(own, name) or 0) > limit:
                raise ValueError(f"params has {name}={getattr(own, name)}, above {limit}")
    asked = asked_by(resolved, vocab_size, eos_token_ids, max_model_len)
    return asked | WarmUpPlan(tuple(shapes), tuple(s for s in shapes if _holds_decode(s, buckets)))


def idle_beams(width: int, num_candidates: int, *, processed: bool = False) -> BeamBatch:
    """Beams of a search that has not begun, to compile with: running them changes nothing."""
    slots = np.zeros(width, np.int32)
    scores = slots.astype(np.float32) - np.inf
    return BeamBatch(slots, scores, num_candidates, processed)


def _holds_decode(shape: StepShape, buckets: ShapeBuckets) -> bool:
    """Whether steps of one token a row are padded to a shape: if any are, the largest that fit."""
    most = min(shape.num_tokens, shape.num_rows)
    return buckets.shape(most, most, most) == shape


def _search_of(params: SamplingParams, eos_token_ids: Collection[int]) -> tuple[int, int]:
    chooser = growth_of(params, [0], 1, eos_token_ids).chooser
    assert chooser is not None, "not a search"
    selection = chooser.selection()
    return selection.width, selection.num_candidates
