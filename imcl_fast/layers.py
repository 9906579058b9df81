"""Finds, in a network that knows nothing of it, the layers that are to teach each other.

The network is run once on an example and every call of every submodule is recorded;
what follows are choices over that record.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from . import dense_outputs, outputs
from .dense_outputs import Resize
from .modes import evaluating
from .residual import Additions, Dropouts
from .taps import observed
from .tracing import eager, uncompiled

# Modules that settle where their output has its channels. Not subclasses of LayerNorm:
# there are those for (B, C, H, W).
CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
CHANNELS_LAST = (nn.Linear, nn.Embedding)
LINEAR = (nn.Linear, nn.LayerNorm)
# Modules that only pass on, shrink or mask what the layer before them computed.
PASSIVE = ("torch.nn.modules.pooling", "torch.nn.modules.dropout", "torch.nn.modules.padding")


class Call(NamedTuple):
    """One call of a submodule: the first input and the (first) output, where they are Tensors."""

    input: Tensor | None
    output: Tensor | None
    version: int  # of the output when the call ended; none has -1

    @property
    def overwritten(self) -> bool:
        """Whether something later in the network changed the output in place, or would in
        training."""
        return _version(self.output) != self.version


def _version(x: Tensor | None) -> int:
    """Number of changes in place; inference tensors don't count them."""
    return 0 if x is None or x.is_inference() else x._version


class Trace(NamedTuple):
    """What one run of a network showed.

    Attributes:
        calls: by module path, in order of completion.
        logits: (B, K), (B, K, *spatial) or (B, *tokens, K); None where the network returns none.
        why: then, what it returned instead.
        class_dim: where dense logits have their classes, 1 or -1; None for (B, K).
        makers: by path, the modules whose output is the logits, or becomes them; and how.
        shape: of the logits, or of the Tensor in their place; None where there is none.
        rivals: paths of the modules whose output is that of another classifier of dense logits.
        channels_last: paths of the modules whose output is (B, *positions, C), as the tokens
            of a transformer are, and not (B, C, *spatial). This is about the order of the
            dimensions, not the strides.
        residual: paths of the residual blocks; see residual.py.
        batch: how many samples there were, where the example tells.
        decodes: whether the example has a target that a decoder reads, beside a source.
    """

    model: nn.Module
    calls: dict[str, list[Call]]
    logits: Tensor | None
    why: str
    class_dim: int | None
    makers: dict[str, Resize]
    shape: torch.Size | None
    rivals: frozenset[str]
    channels_last: frozenset[str]
    residual: frozenset[str]
    batch: int | None
    decodes: bool

    def resolution(self, name: str) -> tuple[int, ...]:
        """Spatial size of a module's output, or number of tokens; () where it has none."""
        output = self.calls[name][-1].output
        return () if output is None else self.positions(name, output)

    def positions(self, name: str, x: Tensor) -> tuple[int, ...]:
        """The dimensions of ``x``, laid out as the module's output, without batch and channels."""
        return tuple(x.shape[1:-1] if name in self.channels_last else x.shape[2:])

    def predicts(self, name: str) -> bool:
        """Whether a module's output is one of classes."""
        return name in self.makers or name in self.rivals

    def of_source(self, name: str) -> bool:
        """Whether a module reads what another half of the network decodes."""
        return self.decodes and outputs.half(name) == "encoder"

    def upstream(self, name: str, weights: Sequence[str]) -> list[str]:
        """Of paths of weights, or of modules that have them, those that ran before a module was
        done, in the same part of the network: its output is, as a rule, made with them."""
        done = list(self.calls)
        before = {name, *done[: done.index(name)]}
        part = name.partition(".")[0]
        return [
            path for path in weights
            if path.partition(".")[0] == part and before & {path, path.rpartition(".")[0]}
        ]  # fmt: skip

    def of_batch(self, call: Call) -> bool:
        """Whether an output has a row for each sample, and not for each of its windows."""
        return self.batch is None or (call.output is not None and len(call.output) == self.batch)

    @property
    def spatial_ranks(self) -> set[int]:
        return spatial_ranks(self.model)


def trace(
    model: nn.Module,
    example_input: Any,
    how: Callable[[Any], Tensor] | None = None,
    class_dim: int | None = None,
    criterion: bool = False,
    sigmoid: bool = False,
) -> Trace:
    """Run ``example_input`` in eval mode, without gradient or trace left; of a Tensor one sample.

    Args:
        how: to find the logits; see ``outputs.logits``.
        class_dim: where dense logits have their classes; None finds out.
        criterion: whether the output may be meant for something else than cross entropy.
        sigmoid: whether it is known to be the logits of labels that hold or not, of one at least.

    Raises:
        TypeError, ValueError: ``example_input`` is no batch, or ``how`` finds no Tensor.
    """
    if isinstance(example_input, Tensor):
        if example_input.dim() < 2 or len(example_input) < 1:
            raise ValueError(
                "example_input: expected a batch of at least 1 sample, as the network takes it, "
                f"got shape {tuple(example_input.shape)}"
            )
        # One sample shows as much as a batch, and every activation is held for a while.
        example_input = example_input[:1]
    elif not isinstance(example_input, (tuple, Mapping)):
        raise TypeError(
            "example_input: expected a Tensor, a tuple of arguments or a dict of keyword "
            f"arguments, got {type(example_input).__name__}"
        )
    model = uncompiled(model)
    args, kwargs = outputs.arguments(example_input, {})
    labels = kwargs.pop(outputs.LABELS, None)
    calls: dict[str, list[Call]] = {}
    additions = Additions(model)

    def record(call: tuple[str, int], module: nn.Module, inputs: tuple, output: object) -> None:
        first = next((x for x in inputs[:1] if isinstance(x, Tensor)), None)
        result = outputs.first_tensor(output)
        additions.finished.append(additions.running.pop())
        calls.setdefault(call[0], []).append(Call(first, result, _version(result)))

    def overwrites(x: Tensor) -> None:
        for of_module in calls.values():
            for i, call in enumerate(of_module):
                if call.output is not None and dense_outputs.share_memory(call.output, x):
                    of_module[i] = call._replace(version=-1)

    seen_by = observed(model, record, additions.running.append)
    dropouts = Dropouts(overwrites)
    with evaluating(model), torch.no_grad(), eager(), additions, dropouts, seen_by:
        output = model(*args, **kwargs)
    channels_last = _channels_last(model, calls)
    shape, rivals = None, frozenset[str]()
    try:
        found = outputs.logits(output, how)
    except TypeError as error:
        if how is not None:
            raise
        seen = dense_outputs.Found(None, str(error), None, {})
    else:
        shape = found.shape
        last = {name: of_module[-1].output for name, of_module in calls.items()}
        linear = [x for x in last if isinstance(model.get_submodule(x), (_ConvNd, nn.Linear))]
        seen = dense_outputs.find(
            found,
            last,
            channels_last,
            linear,
            [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)],
            labels,
            spatial_ranks(model),
            where=class_dim,
            sure=how is not None or class_dim is not None or (sigmoid and not criterion),
            named=not isinstance(output, (Tensor, tuple, list)),
            criterion=criterion,
            least=1 if sigmoid else 2,
        )
        if seen.logits is not None and seen.class_dim is not None:
            taken = [x for all_of in calls.values() for x, *_ in all_of if x is not None]
            rivals = dense_outputs.rivals(found, last, linear, taken, seen.class_dim)
    # What became the logits by a change in place of its output hasn't computed these.
    own = {name: how for name, how in seen.makers.items() if not calls[name][-1].overwritten}
    seen = seen._replace(makers=own)
    batch = len(args[0]) if args and isinstance(args[0], Tensor) else None
    if batch is None:
        batch = next((len(x) for x in kwargs.values() if isinstance(x, Tensor) and x.dim()), None)
    residual = additions.blocks(model)
    decodes = outputs.Padding.of(kwargs).decodes
    return Trace(model, calls, *seen, shape, rivals, channels_last, residual, batch, decodes)


def find_layers(trace: Trace) -> list[str]:
    """The last block of every spatial resolution; in a flat network the last layer of each.

    A block is a container that leads from one resolution to one other at most, such as a stage
    of a ResNet, or a residual block, whatever it does inside. Where there are blocks, the single
    layers beside them (the stem) don't count; where there are none (the ``features`` of a VGG),
    the last layer that follows a convolution before each change of resolution does. As many
    positions are one resolution, be they tokens or pixels. Outputs of one position, those
    that the network overwrites in place, and what makes the logits, are left out, and so is the
    encoder where the example has a target for a decoder.

    Where that finds no two, or all residual blocks have one resolution, as in a vision
    transformer, it is the blocks at 1/4, 2/4, 3/4 and the end of the longest row of them.
    """
    row = _quarters_of_longest_row(trace)
    residual = {name: math.prod(trace.resolution(name)) for name in trace.residual}
    residual = {name: size for name, size in residual.items() if size != 1}
    container = f"{row[0].rpartition('.')[0]}." if row else ""
    inside = all(f"{name}.".startswith(container) for name in residual)
    if len(row) == 4 and len(set(residual.values())) == 1 and inside:
        return row
    layers = _last_of_each_resolution(trace)
    return max(layers, row, key=len) if len(layers) < 2 else layers


def _last_of_each_resolution(trace: Trace) -> list[str]:
    blocks: dict[int, str] = {}
    single: dict[int, str] = {}
    convolved: set[int] = set()
    ranks = trace.spatial_ranks
    for name in sorted(_units(trace, "", trace.model), key=list(trace.calls).index):
        module, call = trace.model.get_submodule(name), trace.calls[name][-1]
        size = trace.resolution(name)
        known_rank = name in trace.channels_last or len(size) in ranks
        pixels = math.prod(size)
        if not size or not known_rank or pixels == 1 or not trace.of_batch(call):
            continue
        if trace.predicts(name) or trace.of_source(name):
            continue
        if isinstance(module, _ConvNd):
            convolved.add(pixels)
        if call.overwritten or len(trace.calls[name]) > 1:
            continue
        if has_children(module):
            blocks[pixels] = name
        elif pixels in convolved and not is_passive(module):
            single[pixels] = name
    return sorted((blocks or single).values(), key=list(trace.calls).index)


def _quarters_of_longest_row(trace: Trace) -> list[str]:
    """Up to four of the most blocks of one class and shape that one container holds."""
    rows: dict[tuple, list[str]] = {}
    for name, calls in trace.calls.items():
        module, call = trace.model.get_submodule(name), calls[0]
        if call.output is None or call.overwritten or len(calls) > 1:
            continue
        if not trace.of_batch(call) or trace.predicts(name) or trace.of_source(name):
            continue
        inside = any(path in trace.residual for path in _parents(name))
        if has_children(module) and trace.resolution(name) and not inside:
            row = (name.rpartition(".")[0], type(module), call.output.shape)
            rows.setdefault(row, []).append(name)
    longest = max(rows.values(), key=len, default=[])
    ends = {math.ceil(quarter * len(longest) / 4) for quarter in range(1, 5)}
    return [longest[end - 1] for end in sorted(ends) if longest]


def check_layers(trace: Trace, layers: Sequence[str]) -> list[str]:
    """``layers`` in the order the network runs them.

    Raises:
        TypeError, ValueError: one is not the path of a module that runs once and returns
            features (B, C, *spatial) or tokens (B, *positions, C), C >= 2, that stay as
            they are.
    """
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(
            f"layers: expected a sequence of module paths or None, got {type(layers).__name__}"
        )
    ranks = trace.spatial_ranks
    for name in layers:
        call = only_call(trace, "layers", name)
        shape = None if call.output is None else tuple(call.output.shape)
        rank, tokens = len(trace.resolution(name)), name in trace.channels_last
        known_rank = tokens or not ranks or rank in ranks
        if shape is None or rank < 1 or shape[-1 if tokens else 1] < 2 or not known_rank:
            raise ValueError(
                f"layers: expected modules that return features (B, C, *spatial) with C >= 2, "
                f"as the network's convolutions do, or tokens (B, T, C); {name!r} returns "
                f"{shape or 'no Tensor'}"
            )
        if call.overwritten:
            raise ValueError(
                f"layers: the output of {name!r} is overwritten in place by a later module; "
                "name that module instead, or make it inplace=False"
            )
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers: expected every module once, got {list(layers)}")
    return sorted(layers, key=list(trace.calls).index)


def _units(trace: Trace, prefix: str, module: nn.Module) -> Iterator[str]:
    """Paths of the blocks and single layers that a network is a sequence of."""
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if has_children(child) and not _is_block(trace, name):
            yield from _units(trace, f"{name}.", child)
        elif name in trace.calls:
            yield name


def _is_block(trace: Trace, name: str) -> bool:
    """Whether what a container computes is all at its input's or its output's resolution.

    Of a residual block within it what counts is what leaves that.
    """
    calls = trace.calls.get(name, [])
    if len(calls) != 1 or calls[0].output is None or calls[0].input is None:
        return False
    if name in trace.residual:
        return True
    start = math.prod(trace.positions(name, calls[0].input))
    end = math.prod(trace.resolution(name))
    computing = list(_computing(trace, name))
    blocks = [math.prod(trace.resolution(path)) for path in computing if path in trace.residual]
    if start != end and blocks.count(start) > 1 and end not in blocks:
        return False  # a stage that ends with the step to the next one's resolution
    sizes = [trace.resolution(path) for path in computing]
    pixels = [math.prod(size) for size in sizes if size]  # a linear layer after pooling has none
    # One-pixel convolutions inside a block are gates (squeeze and excitation).
    return bool(pixels) and all(count in (start, end, 1) for count in pixels)


def _computing(trace: Trace, name: str) -> Iterator[str]:
    """Paths of the convolutions, linear layers and outermost residual blocks in a container."""
    start = len(name.split("."))
    for path in trace.calls:
        if not path.startswith(f"{name}."):
            continue
        if any(parent in trace.residual for parent in list(_parents(path))[start:]):
            continue
        module = trace.model.get_submodule(path)
        if path in trace.residual or isinstance(module, (_ConvNd, nn.Linear)):
            yield path


def _parents(path: str) -> Iterator[str]:
    """``a``, ``a.b`` of ``a.b.c``."""
    parts = path.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _channels_last(model: nn.Module, calls: dict[str, list[Call]]) -> frozenset[str]:
    """Paths of the modules whose output is (B, *positions, C): see ``Trace.channels_last``.

    Convolutions and linear layers say it for themselves. Any other module's output is laid
    out like that of the convolutions inside it, or else of the last module before it, that
    gave one of the same shape; or else of the linear layers inside it that gave as many
    numbers, with the positions in another order (windows).
    """
    modules = dict(model.named_modules())
    ranks = spatial_ranks(model)
    last: set[str] = set()
    seen: dict[torch.Size, bool] = {}
    for name, (*_, call) in calls.items():
        if call.output is None:
            continue
        module, shape = modules[name], call.output.shape
        inside = {
            path: found
            for path in calls
            if path.startswith(f"{name}.") and (found := _shape(calls[path])) is not None
        }
        if isinstance(module, CHANNELS_FIRST) or any(
            isinstance(modules[path], CHANNELS_FIRST) and found == shape
            for path, found in inside.items()
        ):
            seen[shape] = False
        elif (
            isinstance(module, CHANNELS_LAST)
            or type(module) is nn.LayerNorm
            or (shape not in seen and _of_linear(modules, inside, shape))
        ):
            seen[shape] = True
        if seen.get(shape, len(shape) == 3 and 1 not in ranks):
            last.add(name)
    return frozenset(last)


def _of_linear(
    modules: Mapping[str, nn.Module], inside: Mapping[str, torch.Size], shape: torch.Size
) -> bool:
    """Whether a linear layer inside gave as many numbers, and as many of them last."""
    return any(
        isinstance(modules[path], LINEAR)
        and (found[-1:], found.numel()) == (shape[-1:], shape.numel())
        for path, found in inside.items()
    )


def _shape(calls: list[Call]) -> torch.Size | None:
    return None if calls[-1].output is None else calls[-1].output.shape


def spatial_ranks(model: nn.Module) -> set[int]:
    """Number of spatial dimensions of a network's convolutions; empty if it has none."""
    return {len(m.kernel_size) for m in model.modules() if isinstance(m, _ConvNd)}


def has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def is_passive(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or type(module).__module__ in PASSIVE


def only_call(trace: Trace, argument: str, name: str) -> Call:
    """The one call of a module that the user named."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected module paths (str), got {type(name).__name__}")
    if name not in dict(trace.model.named_modules()) or name == "":
        raise unknown(argument, name, trace.calls)
    calls = trace.calls.get(name, [])
    if len(calls) != 1:
        raise ValueError(
            f"{argument}: expected modules that run once per forward pass; {name!r} ran "
            f"{len(calls)} times on example_input"
        )
    return calls[0]


def unknown(argument: str, name: object, known: Sequence[str] | dict) -> ValueError:
    close = difflib.get_close_matches(str(name), [path for path in known if path])
    hint = f"did you mean {', '.join(map(repr, close))}?" if close else (
        "paths are those of model.named_modules()"
    )
    return ValueError(f"{argument}: the network has no module {name!r}; {hint}")
