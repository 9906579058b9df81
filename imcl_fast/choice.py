"""What each way of an ``IMCL`` acts on: what the user named, or what is found in the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import layers as find
from .classifier import check_classifier, find_classifier, predictors
from .dense_outputs import fits
from .kernel_choice import check_kernels, find_kernels


@dataclass
class Choice:
    """Attributes:
    layers: paths of the layers of ways 2 and 3, in the order the network runs them.
    headed: those of them that get an auxiliary classifier.
    classifier: path of the linear layer, or convolution, of way 1.
    kernels: paths of the modules of way 4.
    nothing: why a way has nothing to act on, by the name of its weight.
    """

    layers: list[str] = field(default_factory=list)
    headed: list[str] = field(default_factory=list)
    classifier: str | None = None
    kernels: list[str] = field(default_factory=list)
    nothing: dict[str, str] = field(default_factory=dict)

    @property
    def warning(self) -> str:
        reasons = dict.fromkeys(self.nothing.values())
        told = "; ".join(
            f"{' and '.join(name for name in self.nothing if self.nothing[name] == why)} ({why})"
            for why in reasons
        )
        return (
            "IMCL: these have nothing to act on in this network and are switched off, as by a "
            f"weight of 0: {told}"
        )


def choose(
    trace: find.Trace,
    weights: Mapping[str, float],
    layers: Sequence[str] | None,
    classifier: str | None,
    kernels: Sequence[str] | None,
) -> Choice:
    """For the ways whose weight isn't 0.

    Args:
        weights: of the four ways, by name.
        layers, classifier, kernels: as the user named them; None finds them.

    Raises:
        TypeError, ValueError: what the user named won't do.
    """
    choice = Choice()
    on = {name for name, weight in weights.items() if weight}
    if trace.logits is None:
        for name in ("output_weight", "multilayer_weight"):
            if name in on:
                choice.nothing[name] = trace.why
        on -= choice.nothing.keys()
    least = 2 if "multilayer_weight" in on else 1 if "representation_weight" in on else 0
    if least:
        if layers is None:
            _find_layers(trace, on, choice)
        else:
            choice.layers = _check_layers(trace, layers, least)
    if "multilayer_weight" in on - choice.nothing.keys():
        _find_headed(trace, choice)
    if "output_weight" in on:
        if classifier is None:
            _find_classifier(trace, choice)
        else:
            choice.classifier = check_classifier(trace, classifier)
    if "kernel_weight" in on:
        if kernels is None:
            _find_kernels(trace, choice)
        else:
            choice.kernels = check_kernels(trace.model, kernels)
            if not choice.kernels:
                raise ValueError("kernels: expected at least one module, or pass kernel_weight=0")
    return choice


def _check_layers(trace: find.Trace, layers: Sequence[str], least: int) -> list[str]:
    chosen = find.check_layers(trace, layers)
    if len(chosen) < least:
        what = "multi-layer consistency" if least > 1 else "representation similarity"
        off = "multilayer_weight=0" if least > 1 else "representation_weight=0"
        raise ValueError(
            f"layers: expected at least {least} for {what}, got {chosen}; name more modules, or "
            f"pass {off}"
        )
    return chosen


def _find_layers(trace: find.Trace, on: set[str], choice: Choice) -> None:
    chosen = find.find_layers(trace)
    for name, least in (("multilayer_weight", 2), ("representation_weight", 1)):
        if name in on and len(chosen) < least:
            choice.nothing[name] = (
                f"layers: expected at least {least}, found {chosen}; name the modules, or give a "
                "larger example_input"
            )
    if on - choice.nothing.keys() & {"multilayer_weight", "representation_weight"}:
        choice.layers = chosen


def _find_headed(trace: find.Trace, choice: Choice) -> None:
    """All but the last, which the network's own classifier is for; of a dense output those whose
    positions can be made its."""
    choice.headed = choice.layers[:-1]
    if trace.class_dim is None or trace.logits is None:
        return
    size = trace.logits.movedim(trace.class_dim, 1).shape[2:]
    choice.headed = [
        name
        for name in choice.headed
        if fits(trace.resolution(name), size)
        # The positions of a source are none of the target's, however many there are.
        and not trace.of_source(name)
    ]
    if not choice.headed:
        choice.nothing["multilayer_weight"] = (
            "layers: expected one whose positions lie over those of the logits "
            f"{tuple(trace.logits.shape)}, as maps or as tokens row by row, among "
            f"{choice.layers[:-1]}; name other modules"
        )


def _find_classifier(trace: find.Trace, choice: Choice) -> None:
    try:
        choice.classifier = find_classifier(trace)
    except ValueError as error:
        choice.nothing["output_weight"] = str(error)


def _find_kernels(trace: find.Trace, choice: Choice) -> None:
    choice.kernels = find_kernels(trace.model, predictors(trace))
    if not choice.kernels:
        choice.nothing["kernel_weight"] = (
            "kernels: found no layer, but for what makes the output, with fewer than twice as many "
            "kernels as weights in each (more can't become unlike) and no stem; name the modules"
        )
